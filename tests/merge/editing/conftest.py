import edits
import pytest


@pytest.fixture(scope="session")
def artifacts(family, tmp_path_factory):
    """By form, an artifact in bfloat16, merged when a test first asks for it. Read only."""
    root, built = tmp_path_factory.mktemp("artifacts"), {}

    def get(form):
        if form not in built:
            built[form] = edits.build(root / form, family, **edits.FORMS[form])
        return built[form]

    return get


@pytest.fixture
def fresh(artifacts, tmp_path):
    """A copy of the artifact of a form, to be changed."""
    return lambda form: edits.copied(artifacts(form), tmp_path / "work" / form)
