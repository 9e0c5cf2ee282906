"""URLs of an engine: what they mean, and that a password is never shown."""

from pathlib import Path

import pytest
import yaml

from notellm2_core.config.load import ConfigError, load_config
from notellm2_core.config.milvus import MilvusUrl, without_password
from notellm2_core.config.settings import ServingSettings

SECRET = "s3cret"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("milvus://db.example.org:1953", MilvusUrl("http://db.example.org:1953")),
        ("milvus://db.example.org", MilvusUrl("http://db.example.org:19530")),
        ("milvus://[::1]:1953/notes", MilvusUrl("http://[::1]:1953", "notes")),
        ("milvus://me:a%2Fb%20@h:1", MilvusUrl("http://h:1", "", "me", "a/b ")),
        ("milvus://me:a:b@c@h:1/", MilvusUrl("http://h:1", "", "me", "a:b@c")),
        ("milvus://./notes.db", MilvusUrl("./notes.db")),
        ("milvus://../some%20folder/notes.db", MilvusUrl("../some folder/notes.db")),
        ("milvus:///data/notes.db", MilvusUrl("/data/notes.db")),
    ],
)
def test_servers_and_files(url: str, expected: MilvusUrl) -> None:
    assert MilvusUrl.parse(url) == expected
    assert expected.is_file == url.endswith(".db")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"postgresql://me:{SECRET}@h/d", "not 'postgresql'"),
        (f"milvus://me:{SECRET}/1@h:1", "no port that can be read"),
        (f"milvus://me:{SECRET}@h:port", "no port that can be read"),
        (f"milvus://me:1/{SECRET}@h:1", "the name of a database"),
        (f"milvus://me:1#{SECRET}@h:1", "in a password, they are %3F and %23"),
        (f"milvus://me:{SECRET}@h:1?secure=true", "in a password, they are %3F and %23"),
        ("milvus://./notes", "ends with .db"),
        ("./notes.db", "not './notes.db'"),
        ("", "not ''"),
    ],
)
def test_other_urls_are_refused_without_a_password(url: str, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        MilvusUrl.parse(url)
    assert said in str(refused.value) and SECRET not in str(refused.value)


def test_a_password_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILVUS_PASSWORD", SECRET)
    assert MilvusUrl.parse("milvus://me@h:1").password == SECRET
    assert MilvusUrl.parse("milvus://me:other@h:1").password == "other"
    assert MilvusUrl.parse("milvus://h:1").password == ""


def test_a_password_is_in_no_text_of_a_configuration() -> None:
    """Configurations are written into releases and shown in logs. What is written can be read again."""
    url = f"milvus://me:{SECRET}@h:1/notes"
    settings = ServingSettings(engine=url)
    assert settings.engine == url  # only the code has it
    parsed = MilvusUrl.parse(url)
    texts = [repr(settings), str(settings), repr(parsed), str(parsed), settings.model_dump_json()]
    texts.append(str(settings.model_dump()))
    assert not any(SECRET in text for text in texts)
    again = ServingSettings.model_validate(settings.model_dump(mode="json"))
    assert again.engine == "milvus://me@h:1/notes"
    assert SECRET not in str(without_password(f"milvus://me@x:{SECRET}@h:1"))


def test_a_wrong_engine_is_one_sentence_about_its_setting(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump({"name": "x", "serving": {"engine": f"mulvis://me:{SECRET}@h:1"}}))
    with pytest.raises(
        ConfigError, match=r"wrong\.yaml: .*serving\.engine: .*an engine is milvus://HOST:PORT"
    ) as refused:
        load_config(file)
    assert SECRET not in str(refused.value) + str(refused.value.__cause__)
