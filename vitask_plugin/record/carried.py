"""What of VITask goes with a checkpoint's weights into another folder: the connector and `vitask.json`."""

import shutil
from pathlib import Path

from vitask_plugin import model_folder
from vitask_plugin.files import write_json
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.record import checkpoint

# They say how to go on training from that folder, and which bytes are in it.
_OF_THE_FOLDER = (checkpoint.RUN, checkpoint.FILES, checkpoint.BASE)


def carry(source: str | Path, target: str | Path) -> None:
    """Copies connector and record, if there are any, without what is true of `source` alone."""
    source, target = Path(source), Path(target)
    if (source / model_folder.CONNECTOR_FILE).is_file():
        shutil.copyfile(source / model_folder.CONNECTOR_FILE, target / model_folder.CONNECTOR_FILE)
    if (source / checkpoint.RECORD_FILE).is_file():
        record = read_json(source / checkpoint.RECORD_FILE, "VITask record")
        write_json(
            target / checkpoint.RECORD_FILE, {key: value for key, value in record.items() if key not in _OF_THE_FOLDER}
        )
