"""The demo source: a small synthetic platform whose signal is known (see `world`), and the weeks after its log."""
