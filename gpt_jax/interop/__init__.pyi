from .architecture import find_meaning as find_meaning, write_config as write_config
from .export import (
    UNFINISHED as UNFINISHED,
    describe_left_out as describe_left_out,
    refuse_nonfinite as refuse_nonfinite,
    write_directory as write_directory,
)
from .finite import describe_nonfinite as describe_nonfinite, watch as watch
from .foreign import (
    TOKENIZER_FILES as TOKENIZER_FILES,
    find_tokenizer as find_tokenizer,
    is_foreign as is_foreign,
    open_foreign as open_foreign,
    read_foreign_model as read_foreign_model,
)
from .origin import Origin as Origin
from .peft import write_peft as write_peft
from .weights import (
    find_depths as find_depths,
    list_shapes as list_shapes,
    load_params as load_params,
)
