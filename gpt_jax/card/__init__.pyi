from .checks import CHECKS as CHECKS, make_card as make_card
from .page import (
    format_page as format_page,
    format_summary as format_summary,
    list_failed as list_failed,
    name_file as name_file,
    to_data as to_data,
)
from .subject import open_subject as open_subject
