import re

import pytest
from relay import ROOT

from tornado_relay import SettingsError
from tornado_relay.settings import FIELDS, Settings, cores, load


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_flag_beats_environment_beats_env_file_beats_default(empty_folder):
    """The nearest source wins, field by field."""
    assert load(environ={}).port == 8001
    (empty_folder / ".env").write_text("RELAY_HTTP_PORT=1\nRELAY_WORKERS=1\nLOG_LEVEL=debug\n")
    settings = load({"port": "3"}, environ={"RELAY_HTTP_PORT": "2", "RELAY_WORKERS": "2"})
    assert (settings.port, settings.workers, settings.log_level) == (3, 2, "DEBUG")


def test_empty_value_is_none_and_hides_the_source_below(empty_folder):
    """DATABASE_URL= in the environment means that there is none."""
    (empty_folder / ".env").write_text("DATABASE_URL=postgresql://file/x\n")
    assert load(environ={"DATABASE_URL": ""}).database_url == ""


def test_env_file_is_the_working_directorys_or_the_named_one(empty_folder):
    """--env-file replaces .env, and must exist."""
    (empty_folder / ".env").write_text("REDIS_URL=redis://a\n")
    (empty_folder / "other.env").write_text("export REDIS_URL='redis://b'  # comment\n")
    assert load(environ={}).redis_url == "redis://a"
    assert load(environ={}, env_file="other.env").redis_url == "redis://b"
    with pytest.raises(SettingsError, match=r"--env-file.*'missing.env'"):
        load(environ={}, env_file="missing.env")


@pytest.mark.parametrize("text", ["1", "true", "True", "TRUE", "yes", "on", "t", "y"])
def test_booleans_in_any_usual_spelling_true(text):
    """As people write them."""
    assert load(environ={"RELAY_USE_PG": text}).use_pg is True


@pytest.mark.parametrize("text", ["0", "false", "False", "no", "off", "f", "n", ""])
def test_booleans_in_any_usual_spelling_false(text):
    """As people write them, or leave them empty."""
    assert load(environ={"RELAY_USE_PG": text}).use_pg is False


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("RELAY_HTTP_PORT", "8001:8001", r"docker run -p"),
        ("RELAY_HTTP_PORT", "70000", "1 to 65535"),
        ("RELAY_HTTP_PORT", "http", "1 to 65535"),
        ("RELAY_WORKERS", "-1", "whole number"),
        ("RELAY_WORKERS", "four", "whole number"),
        ("RELAY_USE_PG", "maybe", "true or false"),
        ("RELAY_HEARTBEAT", "0", "seconds"),
        ("RELAY_HEARTBEAT", "nan", "seconds"),
        ("RELAY_CLIENT_BUFFER", "1MB", "bytes"),
        ("LOG_LEVEL", "LOUD", "TRACE"),
        ("LOG_FORMAT", "xml", "json"),
        ("ALLOWED_ORIGINS", "shop.example", "scheme, host and port"),
        ("ALLOWED_ORIGINS", "https://shop.example/path", "scheme, host and port"),
        ("ALLOWED_ORIGINS", "https://*.shop.example", "scheme, host and port"),
        ("ALLOWED_ORIGINS", "https://shop.example:x", "scheme, host and port"),
    ],
)
def test_wrong_value_is_named_with_what_would_be_right(variable, value, said):
    """The error has the variable, the value and the rule, in one line."""
    with pytest.raises(SettingsError, match=said) as error:
        load(environ={variable: value})
    assert str(error.value).startswith(f"{variable}: {value!r}")
    assert "\n" not in str(error.value)


def test_error_names_the_flag_if_the_value_came_from_one():
    """Whoever typed a flag is told about the flag."""
    with pytest.raises(SettingsError, match=r"^--port: 'x'"):
        load({"port": "x"}, environ={})


@pytest.mark.parametrize(
    ("environ", "broker"),
    [
        ({}, None),
        ({"REDIS_URL": "redis://r"}, ("redis", "redis://r")),
        ({"DATABASE_URL": "postgres://p/d"}, ("postgres", "postgres://p/d")),
        ({"REDIS_URL": "redis://r", "DATABASE_URL": "postgres://p/d"}, ("redis", "redis://r")),
        (
            {"REDIS_URL": "redis://r", "DATABASE_URL": "postgres://p/d", "RELAY_USE_PG": "True"},
            ("postgres", "postgres://p/d"),
        ),
        ({"REDIS_URL": "redis://r", "DATABASE_URL": "sqlite:///db"}, ("redis", "redis://r")),
        ({"REDIS_URL": "rediss://r"}, ("redis", "rediss://r")),
        ({"DATABASE_URL": "postgis://p/d"}, ("postgres", "postgis://p/d")),
        ({"REDIS_URL": "redis://r", "RELAY_USE_PG": "1"}, None),
        (
            {"DATABASE_URL": "postgresql://u:p%40@a:1,b:2,[::1]:3/d?sslmode=require"},
            ("postgres", "postgresql://u:p%40@a:1,b:2,[::1]:3/d?sslmode=require"),
        ),
        (
            {"DATABASE_URL": "postgresql:///d?host=/run/postgresql"},
            ("postgres", "postgresql:///d?host=/run/postgresql"),
        ),
        ({"REDIS_URL": "unix:///run/redis.sock?db=1"}, ("redis", "unix:///run/redis.sock?db=1")),
        (
            {"REDIS_URL": "redis+sentinel://:p%40@a,b:26379,[::1]/m/0?sentinel_password=x"},
            ("redis", "redis+sentinel://:p%40@a,b:26379,[::1]/m/0?sentinel_password=x"),
        ),
        ({"REDIS_URL": "rediss+cluster://a:7000,b"}, ("redis", "rediss+cluster://a:7000,b")),
    ],
)
def test_redis_wins_unless_use_pg(environ, broker):
    """As the predecessor has it; the URL that is not used may be anything."""
    assert load(environ=environ).broker == broker


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"DATABASE_URL": "sqlite:///db.sqlite3"}, "DATABASE_URL must start with postgresql://"),
        ({"DATABASE_URL": "mysql://u:secret@h/d"}, "starts with mysql://"),
        ({"REDIS_URL": "user:secret@host"}, "REDIS_URL must start with redis://"),
        ({"DATABASE_URL": "postgresql://u:sec@ret@h/d"}, "DATABASE_URL cannot be read.*%40"),
        ({"DATABASE_URL": "postgresql://u:sec/ret@h/d"}, "DATABASE_URL cannot be read"),
        ({"DATABASE_URL": "postgresql://u:secret@h:54x2/d"}, "DATABASE_URL cannot be read"),
        ({"DATABASE_URL": "postgresql://u:secret@h:99999/d"}, "DATABASE_URL cannot be read"),
        ({"REDIS_URL": "redis://:sec:ret@r:0/0"}, "REDIS_URL cannot be read"),
        ({"REDIS_URL": "redis+sentinel://:sec@ret@r/m"}, "REDIS_URL cannot be read"),
        ({"REDIS_URL": "sentinel://:secret@r/m"}, "REDIS_URL must start with redis://.*starts with sentinel://"),
        ({"RELAY_AUTH_URL": "http://u:secret@h/may-listen/"}, "RELAY_AUTH_URL: the value is not the URL"),
        ({"RELAY_AUTH_URL": "//h/?secret"}, "RELAY_AUTH_URL: the value is not the URL"),
        ({"RELAY_AUTH_URL": "http://h:/?secret"}, "RELAY_AUTH_URL: the value is not the URL"),
        ({"RELAY_AUTH_URL": "http://a..b/?secret"}, "RELAY_AUTH_URL: the value is not the URL"),
        ({"RELAY_AUTH_URL": "http://h:x/?secret"}, "RELAY_AUTH_URL: the value is not the URL"),
        ({"RELAY_AUTH_URL": "http://h/?secret#x"}, "RELAY_AUTH_URL: the value is not the URL"),
        ({"RELAY_AUTH_URL": "http://h/?secret \u00e9"}, "percent-encoded"),
    ],
)
def test_url_of_another_kind_is_refused_without_its_password(environ, said):
    """The error says what is wrong and never shows a secret."""
    with pytest.raises(SettingsError, match=said) as error:
        _ = load(environ=environ).broker
    assert "sec" not in str(error.value)
    assert "ret@" not in str(error.value)


def test_origins_are_split_at_commas():
    """Blanks and a trailing slash do not matter."""
    settings = load(environ={"ALLOWED_ORIGINS": "https://a.example, http://localhost:8000/ ,"})
    assert settings.allowed_origins == ("https://a.example", "http://localhost:8000")


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("https://Shop.Example", "https://shop.example"),
        ("HTTPS://shop.example:443", "https://shop.example"),
        ("http://shop.example:80/", "http://shop.example"),
        ("https://shop.example:8443", "https://shop.example:8443"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("*", "*"),
    ],
)
def test_origins_are_kept_as_browsers_send_them(written, sent):
    """Lower case, and without the scheme's own port: compared as text they must match."""
    assert load(environ={"ALLOWED_ORIGINS": written}).allowed_origins == (sent,)


def test_settings_are_frozen():
    """Nothing changes them after the start."""
    with pytest.raises(AttributeError):
        Settings().port = 5


def test_worker_count_is_one_per_core_by_default():
    """0 stands for what the machine has."""
    assert Settings().worker_count == cores() >= 1
    assert Settings(workers=3).worker_count == 3


def test_every_setting_has_a_line_in_env_example():
    """.env.example explains each variable, one by one, and nothing else."""
    text = (ROOT / ".env.example").read_text()
    variables = re.findall(r"^#? ?([A-Z_]+)=", text, re.MULTILINE)
    assert variables == [field.metadata["variable"] for field in FIELDS]
    for variable in variables:
        assert re.search(rf"^# [^\n]+\n#? ?{variable}=", text, re.MULTILINE), f"{variable} has no explanation"


def test_env_example_shows_the_defaults(empty_folder):
    """Copied to .env with every line uncommented it changes nothing."""
    text = re.sub(r"^# (?=[A-Z_]+=)", "", (ROOT / ".env.example").read_text(), flags=re.MULTILINE)
    assert "\nRELAY_HTTP_PORT=8001\n" in text
    (empty_folder / ".env").write_text(text)
    assert load(environ={}) == Settings()
