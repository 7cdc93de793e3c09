"""Files wherever they lie: stores (local, http, s3, gs, commands), whole inputs, and the node's cache."""

from .cache import NodeCache as NodeCache
from .errors import AbandonedError as AbandonedError
from .errors import AccessError as AccessError
from .errors import MissingFileError as MissingFileError
from .errors import StorageError as StorageError
from .inputs import open_input as open_input
from .settings import AccessSettings as AccessSettings
from .settings import CacheSettings as CacheSettings
from .settings import RemoteSettings as RemoteSettings
from .settings import StorageSettings as StorageSettings
from .start import check_answers as check_answers
from .start import impatient as impatient
from .store import Store as Store
from .store import open_store as open_store
