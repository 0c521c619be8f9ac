"""nn.Module -> Checkpoint: which tensors a file is to hold, and what is said of them."""

from orthoserde.capture.model import capture, link_record
from orthoserde.capture.scope import Select

__all__ = ["Select", "capture", "link_record"]
