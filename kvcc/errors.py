"""The errors a user can cause. Each carries a stable code and the exit status of the command line."""


class KvccError(Exception):
    """Root of the family: one line that says what was wrong, where, and what to do."""

    code = "KVCC0000"
    exit_status = 2


class DataError(KvccError):
    """A prompt set is missing, empty or unreadable."""

    code = "KVCC0100"


class UnsupportedModel(KvccError):
    """The model cannot be loaded or compiled; the message names its type and the reason."""

    code = "KVCC0200"


class ProfileError(KvccError):
    """A profile is unreadable, or does not belong to this model, data set or statistics version."""

    code = "KVCC0300"


class RecipeError(KvccError):
    """A recipe names an unknown pass, a bad parameter or an impossible order."""

    code = "KVCC0400"


class PassError(KvccError):
    """A pass cannot be applied to this model with these parameters."""

    code = "KVCC0450"


class PlanError(KvccError):
    """A plan contradicts itself or the model's shapes."""

    code = "KVCC0500"


class ArtifactError(KvccError):
    """An artifact is missing, malformed, altered or not understood."""

    code = "KVCC0600"


class KernelUnavailable(KvccError):
    """The requested kernel backend cannot run here; the message says why."""

    code = "KVCC0700"


class CapacityError(KvccError):
    """A prompt, batch or cache does not fit: the model's context, the cache budget, or memory."""

    code = "KVCC0800"


class GateFailed(KvccError):
    """An accuracy gate does not hold."""

    code = "KVCC0900"
    exit_status = 1
