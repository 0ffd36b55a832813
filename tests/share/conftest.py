import fake_hub
import huggingface_hub
import pytest
from huggingface_hub import constants

from mergekit_mediator.share.push import prepare, push


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in of the Hub that huggingface_hub talks to, with the token of one who may write."""
    with fake_hub.running() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", fake_hub.WRITER)
        monkeypatch.setenv(
            "HUGGINGFACE_HUB_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        huggingface_hub.utils.disable_progress_bars()
        yield hub
        huggingface_hub.utils.enable_progress_bars()


@pytest.fixture(scope="module")
def artifact(family, tmp_path_factory):
    """A merged artifact. Read only: tests that change it make a copy."""
    from routed_pico import build

    root = tmp_path_factory.mktemp("shared") / "out"
    build(root, family, density=0.3)
    return root


@pytest.fixture
def pushed(hub, artifact):
    """The Hub with the artifact as `me/merged`."""
    push(prepare(artifact), "me/merged")
    hub.requests.clear()
    return hub
