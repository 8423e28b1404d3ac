"""Names of common.cli, for modules that still import them from here."""

from common.cli import Fault as Fault
from common.cli import Stopped as Stopped
from common.cli import Untrainable as Untrainable
from common.cli import UsageError as UsageError
from common.cli import closest as closest
from common.cli import first_line as first_line
from common.cli import is_out_of_memory as is_out_of_memory
