"""Read and edit a bundle: a folder of artifacts and a manifest with their SHA-256 digests.

Editing is atomic. A command writes its files into a staging folder inside the
bundle, and commits them by renaming that folder to ``.pending``. The files are
then moved to their final paths, the manifest last. If the process dies in
between, the next process that opens the bundle finishes the moves. A reader
therefore sees the old bundle or the new one, never a mixture.

Files are used only if their SHA-256 matches the manifest.
"""

from van_deploy.bundle.editing import Draft, edit_bundle
from van_deploy.bundle.folder import Bundle
from van_deploy.manifest import MANIFEST, Artifact, Manifest, Origin

__all__ = ["MANIFEST", "Artifact", "Bundle", "Draft", "Manifest", "Origin", "edit_bundle"]
