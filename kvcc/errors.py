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


class ArtifactMissing(ArtifactError):
    """There is no artifact there, or a file that its manifest lists is gone."""

    code = "KVCC0601"


class ArtifactVersion(ArtifactError):
    """The artifact, or its graph, is of a version that this kvcc does not read."""

    code = "KVCC0602"


class ArtifactManifest(ArtifactError):
    """manifest.json, or another small JSON file of the artifact, is not what its schema says."""

    code = "KVCC0603"


class ArtifactPath(ArtifactError):
    """A name leads out of the folder, through a link, to no regular file, or to a file nobody lists."""

    code = "KVCC0604"


class ArtifactTruncated(ArtifactError):
    """A file is shorter or longer than the manifest says."""

    code = "KVCC0605"


class ArtifactDigest(ArtifactError):
    """A file's content is not what the manifest's digest says."""

    code = "KVCC0606"


class ArtifactGraph(ArtifactError):
    """The graph is malformed: structure, references, arguments or shapes."""

    code = "KVCC0607"


class ArtifactOperator(ArtifactError):
    """The graph calls something that is not on the list of operators artifacts may use."""

    code = "KVCC0608"


class ArtifactPlan(ArtifactError):
    """The plan is malformed, or contradicts the model's identity or the graph."""

    code = "KVCC0609"


class ArtifactTensor(ArtifactError):
    """A safetensors file is malformed, or a tensor has another name, dtype or shape than needed."""

    code = "KVCC0610"


class ArtifactExists(ArtifactError):
    """The place to write to is taken."""

    code = "KVCC0611"


class ArtifactUnwritable(ArtifactError):
    """An artifact cannot be written: disk full, no permission, read-only or missing folder."""

    code = "KVCC0612"


class ArtifactSignature(ArtifactError):
    """The artifact is not signed, not by a trusted key, or was altered afterwards."""

    code = "KVCC0613"


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
