from .architecture import read_model as read_model, write_config as write_config
from .directory import Foreign as Foreign, is_foreign as is_foreign, open_foreign as open_foreign
from .families import FAMILIES as FAMILIES
from .weights import load_params as load_params
