from .prepare.prepare import (
    Engine as Engine,
    prepare_corpus as prepare_corpus,
)
from .prepare.units import PrepareSettings as PrepareSettings
from .prepare.workers import ENGINES as ENGINES
from .read.decoding import Reading as Reading
from .read.documents import (
    Tally as Tally,
    read_documents as read_documents,
    whole_piece as whole_piece,
)
from .read.remote import is_remote as is_remote, reaching as reaching
from .read.sources import EMPTY_PATHS as EMPTY_PATHS, find_sources as find_sources
from .stream.batches import (
    Examples as Examples,
    check_sizes as check_sizes,
    make_eval_batches as make_eval_batches,
    make_examples as make_examples,
    make_ramp_stream as make_ramp_stream,
    make_stream as make_stream,
)
from .stream.dataset import (
    Dataset as Dataset,
    load_dataset as load_dataset,
    load_heldout as load_heldout,
)
from .stream.rows import make_columns as make_columns
from .stream.sets import load_sets as load_sets
from .stream.streams import (
    EvalBatches as EvalBatches,
    Stream as Stream,
)
from .tasks.chat import TEMPLATE_FILES as TEMPLATE_FILES
from .tasks.classify import Classify as Classify, make_prompt as make_prompt
from .tasks.tasks import TaskNote as TaskNote, read_options as read_options
from .tokenizers.begin import begins_documents as begins_documents
from .tokenizers.bpe import export_json as export_json, find_begin as find_begin
from .tokenizers.spec import (
    Spec as Spec,
    parse_tokenizer_spec as parse_tokenizer_spec,
    resolve_tokenizer as resolve_tokenizer,
    tokenizer_from_json as tokenizer_from_json,
)
from .tokenizers.vocabulary import (
    StreamDecoder as StreamDecoder,
    Tokenizer as Tokenizer,
    with_frame as with_frame,
)
from .tokens.corpus import verify_corpus as verify_corpus
from .tokens.inspect import (
    inspect_corpus as inspect_corpus,
    summarize_corpus as summarize_corpus,
)
from .tokens.shards import Tokens as Tokens
