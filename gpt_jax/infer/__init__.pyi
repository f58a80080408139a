from .decode import (
    generate as generate,
    stream_text as stream_text,
)
from .sampling import Sampling as Sampling
