from .decode import (
    generate as generate,
    stream_text as stream_text,
)
from .settings import Sampling as Sampling
