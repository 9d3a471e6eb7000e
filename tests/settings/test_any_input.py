"""Whatever is given, the answer is settings or a SettingsError, never another exception."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wmtp_worker.errors import SettingsError
from wmtp_worker.settings import Settings, load
from wmtp_worker.settings.environment import KNOWN
from wmtp_worker.settings.schema import FIELDS, SECTIONS

few = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
keys = st.sampled_from([*FIELDS, *sorted(SECTIONS)]) | st.text(max_size=12)
# YAML's own characters come up often enough to matter
words = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
yamlish = st.text(alphabet="[]{}:,-#&*!|>'\"%@` \n\t?~0123456789.eE_+abtrue<", max_size=16)
values = words | yamlish


def check(**arguments):
    try:
        loaded = load(**{"environ": {}, **arguments})
    except SettingsError:
        return
    assert isinstance(loaded, Settings)
    assert set(loaded.sources) == set(FIELDS)


@few
@given(st.lists(st.tuples(keys, values), max_size=3))
def test_any_override(pairs):
    check(overrides=[f"{key}={value}" for key, value in pairs])


@few
@given(st.dictionaries(st.sampled_from(KNOWN) | st.text("WMTP_ABC", min_size=1, max_size=12), values, max_size=3))
def test_any_environment(environ):
    check(environ=environ)


@few
@given(keys, values)
def test_any_yaml_file(elsewhere, key, value):
    group, _, leaf = key.partition(".")
    (elsewhere / "mine.yaml").write_text(f"{group}:\n  {leaf}: {value}\n", encoding="utf-8")
    check(preset="mine.yaml")


@few
@given(st.binary(max_size=40) | st.lists(words | yamlish, max_size=4).map(lambda lines: "=".join(lines).encode()))
def test_any_bytes_as_yaml_and_as_env_file(elsewhere, content):
    (elsewhere / "mine.yaml").write_bytes(content)
    (elsewhere / ".env").write_bytes(content)
    check(recipe="mine.yaml")
