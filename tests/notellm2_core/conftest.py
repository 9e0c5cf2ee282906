import notellm2_core.torch_compat  # noqa: F401, before any test module imports transformers
