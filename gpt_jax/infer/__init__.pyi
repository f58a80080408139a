from .classify import (
    Classified as Classified,
    classify_prompts as classify_prompts,
    encode_labels as encode_labels,
    score_labels as score_labels,
)
from .decode import (
    generate as generate,
    stream_text as stream_text,
)
from .prompts import encode_text as encode_text
from .requests import (
    Request as Request,
    encode_pairs as encode_pairs,
    fit_request as fit_request,
    is_too_long as is_too_long,
    make_rolling_requests as make_rolling_requests,
    start_request as start_request,
    start_token as start_token,
)
from .score import (
    Score as Score,
    carry_on as carry_on,
    compute_logits as compute_logits,
    score_requests as score_requests,
)
from .settings import Sampling as Sampling
