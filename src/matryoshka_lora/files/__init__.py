"""Writing files so that neither a failure nor a kill leaves a mixture of old and new ones.

Everything is written under another name on the same file system, flushed to the disk and then renamed. A full disk, a
missing permission or a file in the way becomes a `MatryoshkaError` that names the path and the way out.

What holds, for a single file (`write_text`, `replace_file`) and for a folder that did not exist: one rename puts it
into place, so the old state or the new one is there at every moment, whatever happens.

What holds for a folder that exists (`replace_directory`, `output_directory`), some of whose files are replaced while
others stay: all new files are complete in ``.writing/new`` before the first old one is touched, and a journal beside
them says which files are to be put and which are to be taken. An error or Ctrl-C on the way is undone at once. After a
kill or a power cut, whoever opens or writes the folder next through this package completes the journal (`settle`). A
program that knows nothing of it finds, until then, the old files, the new ones, or no ``adapter_config.json``
(``config.json``, ``evaluation.json``): that file is taken before the weights move and put after them, so an old one
never stands beside new weights, nor a new one beside old weights. For an adapter, it is missing while its weights are
renamed, and no other file moves in that time. One program writes a folder at a time; a second one waits, and is refused
after half a minute. What a killed writer has left is removed by the next one. A reader that a writer has overtaken is
told to read again (`one_state`).
"""

from matryoshka_lora.files.disk import (
    EVALUATION,
    EVALUATION_FILES,
    EVALUATION_FOLDER,
    EVALUATION_NAME,
    PICTURE_NAME,
    SPECTRA_NAME,
    TRAINED_NAME,
    WRITTEN_BY_US,
    adapter_files,
    check_free,
    checkpoint_file,
    is_ours,
    kinds_in,
    output_files,
    output_path,
    read_bytes,
    read_text,
)
from matryoshka_lora.files.switch import Mark, mark
from matryoshka_lora.files.writing import (
    check_writable,
    one_state,
    output_directory,
    replace_directory,
    replace_file,
    settle,
    write_text,
)

__all__ = [
    "EVALUATION",
    "EVALUATION_FILES",
    "EVALUATION_FOLDER",
    "EVALUATION_NAME",
    "PICTURE_NAME",
    "SPECTRA_NAME",
    "TRAINED_NAME",
    "WRITTEN_BY_US",
    "Mark",
    "adapter_files",
    "check_free",
    "check_writable",
    "checkpoint_file",
    "is_ours",
    "kinds_in",
    "mark",
    "one_state",
    "output_directory",
    "output_files",
    "output_path",
    "read_bytes",
    "read_text",
    "replace_directory",
    "replace_file",
    "settle",
    "write_text",
]
