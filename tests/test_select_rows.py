"""scripts/select_rows.py on masks whose shares are known."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm.util import UserError
from scripts.select_rows import main

MASKS = {  # ids of the table mini: 0 building, 1 land, 2 road, 3 vegetation, 4 water
    "bare": [1] * 64, "half": [0] * 32 + [1] * 32, "little": [0] * 9 + [1] * 55, "many": [1] * 40 + [2] * 12 + [3] * 12,
    "dust": [1] * 58 + [2] * 3 + [3] * 3, "ignored": [255] * 64,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    rows = []
    for name, ids in MASKS.items():
        Image.fromarray(np.reshape(ids, (8, 8)).astype(np.uint8)).save(tmp_path / f"{name}.png")
        rows += [{"source": f"{name}.png", "prompt": "é", "ref_image": f"{copy}.png"} for copy in range(2)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "all.json").write_text("\n".join([*lines[:3], "", *lines[3:]]), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "flags, expected",
    [(["--min_share", "building=0.14"], ["half", "little"]), (["--min_share", "building=0.5"], ["half"]),
     (["--min_share", "building=0.5, road=0.18"], ["half", "many"]), (["--min_classes", "3"], ["many"]),
     (["--min_share", "building=0.5", "--min_classes", "2"], ["half", "little", "many"])],
)  # fmt: skip
def test_rows_of_rich_masks_stay_as_they_are(folder, capsys, flags, expected):
    main([str(folder / "all.json"), str(folder / "rich.json"), "--data_root", str(folder), "--class_table", "mini",
          *flags])  # fmt: skip
    lines = (folder / "rich.json").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["source"] for line in lines] == [f"{name}.png" for name in expected for _ in range(2)]
    assert set(lines) <= set((folder / "all.json").read_text(encoding="utf-8").splitlines())
    assert capsys.readouterr().out.startswith(f"{len(lines)} of 12 rows, {len(expected)} of 6 masks")


@pytest.mark.parametrize(
    "flags, message",
    [(["--min_share", "house=0.1"], "house=0.1.*one of building"), (["--min_share", "road=15"], r"road=15.*\(0, 1\]"),
     (["--min_share", "road"], "CLASS=SHARE"), ([], "none of 12 rows"), (["--min_classes", "5"], "none of 12 rows")],
)  # fmt: skip
def test_mistakes_write_nothing(folder, flags, message):
    with pytest.raises(UserError, match=message):
        main([str(folder / "all.json"), str(folder / "rich.json"), "--data_root", str(folder), "--class_table", "mini",
              *flags])  # fmt: skip
    assert not (folder / "rich.json").exists()
