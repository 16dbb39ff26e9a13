"""The errors of this toolkit: one root, and a child for each thing that can be wrong.

Where the root or a child is caught, a person's input was at fault, and its message says what was
wrong and what to do. Anything else that is raised, but for `OSError` and `MemoryError`, is a bug of
ours: it is never counted as a bad photo, and it surfaces with its traceback.
"""

from __future__ import annotations


class DsgnnError(Exception):
    """Something that the caller can mend; the message says how."""


class OptionError(DsgnnError, ValueError):
    """An argument or option that cannot be, or that does not go with another.

    about: the names of the arguments concerned. A command turns them into its own options.
    """

    def __init__(self, message: str, *about: str):
        super().__init__(message)
        self.about = about


class InputError(DsgnnError, ValueError):
    """A photo, video or list of sources that cannot be read or ranked."""


class ArtifactError(DsgnnError, ValueError):
    """An artifact or sidecar that is not ours, is damaged, or is not what it is said to be."""


class BackendError(DsgnnError, RuntimeError):
    """An inference library that is missing, or that cannot run the artifact as asked."""


class DataError(DsgnnError, ValueError):
    """A data set, its annotations, or predictions for it that are missing parts or broken."""


class CheckpointError(DsgnnError, ValueError):
    """Weights that are not a checkpoint, are damaged, or do not fit the network."""


class NotFiniteError(DsgnnError, FloatingPointError):
    """A loss or its gradient that is no longer a finite number: training cannot go on."""


class FolderBusyError(DsgnnError, RuntimeError):
    """Another run is writing into the folder."""


class FirstPictureWarning(UserWarning):
    """A file holds several pictures, and only the first was taken."""
