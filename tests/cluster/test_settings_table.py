from pathlib import Path

import cluster
from cluster.config import ClusterConfig
from cluster.settings_table import settings_page

PAGE = Path(cluster.__path__[0]).parent / "docs" / "settings.md"


def test_the_page_of_settings_is_that_of_the_code():
    assert PAGE.read_text() == settings_page(), "python -m cluster.settings_table > docs/settings.md"


def test_every_key_is_there_once_and_explained():
    rows = [line.split(" | ") for line in settings_page().splitlines() if line.startswith("| `")]
    assert sorted(row[0].strip("| `") for row in rows) == sorted(ClusterConfig.model_fields)
    assert all(len(row) == 3 and len(row[2]) > 10 for row in rows)
