"""A bundle on disk: a folder of artifacts and the manifest that vouches for them.

Writing is all or nothing. A command collects its files in a staging folder
inside the bundle; one ``rename`` of that folder to ``.pending`` is the moment
it counts. The files are then moved to their places, the manifest last, and if
the process dies half-way the next one to open the bundle finishes the moves.
So a reader sees the old bundle or the new one, never a mixture.

Reading believes nothing whose SHA-256 is not the manifest's.
"""

from van_deploy.bundle.commit import SIGNATURE
from van_deploy.bundle.editing import Draft, edit_bundle
from van_deploy.bundle.reading import Bundle
from van_deploy.manifest import MANIFEST, Artifact, Manifest, Origin

__all__ = [
    "MANIFEST",
    "SIGNATURE",
    "Artifact",
    "Bundle",
    "Draft",
    "Manifest",
    "Origin",
    "edit_bundle",
]
