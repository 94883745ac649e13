//! Pushes the chunks of an image beside it.

use std::sync::Arc;

use super::artifact::{self, Artifact, EMPTY, OCI_INDEX, OCI_MANIFEST};
use super::find;
use super::pack::{self, Packed};
use crate::image::manifest::Blob;
use crate::image::{Digest, ImageRecord};
use crate::registry::fetch::FetchError;
use crate::registry::progress::{Meter, Phase};
use crate::registry::pull::Registries;
use crate::registry::push::PushError;
use crate::registry::reference::Reference;
use crate::registry::session::Session;
use crate::registry::upload::{self, Upload};

/// What was pushed of an image's chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The manifest of the chunks.
    pub artifact: Digest,
    /// Bytes of the packs.
    pub packed_bytes: u64,
    /// The same before they were compressed; chunks of zeros, and chunks that are there twice, are not in it.
    pub plain_bytes: u64,
}

impl Registries {
    /// Pushes the chunks of an image whose manifest the registry has: packs, index, manifest, and where the registry has no
    /// referrers API, the tag that stands for it.
    pub(in crate::registry) async fn publish(
        &self,
        session: &Session,
        record: &ImageRecord,
        subject: (Blob, String),
        target: &Reference,
        meter: &Meter,
    ) -> Result<Published, PushError> {
        let (subject, subject_type) = subject;
        meter.phase(Phase::Pack);
        let (store, own) = (Arc::clone(&self.store), record.clone());
        let packed = tokio::task::spawn_blocking(move || {
            let first_uses = store.order(&own.erofs_digest)?.list();
            pack::pack(&store, &own, &first_uses)
        });
        let packed = packed.await??;
        let Packed {
            index,
            packs,
            plain_bytes,
            ..
        } = &packed;
        let of = |bytes: &[u8]| Blob {
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
        };
        let uploads: Vec<Upload> = packs
            .iter()
            .map(|(blob, path)| Upload::file(*blob, path.clone()))
            .chain([
                Upload::bytes(of(index), index.clone()),
                Upload::bytes(of(EMPTY), EMPTY.to_vec()),
            ])
            .collect();
        upload::all(session, uploads, meter)
            .await
            .map_err(|error| PushError::of_upload(target, error))?;
        let artifact = Artifact {
            index: of(index),
            packs: packs.iter().map(|(blob, _)| *blob).collect(),
        };
        let manifest = artifact.manifest(subject, &subject_type);
        let own = of(&manifest);
        let answer = upload::manifest(session, &own.digest.to_string(), OCI_MANIFEST, manifest)
            .await
            .map_err(|error| PushError::of_request(target, error))?;
        // A registry that lists what refers to an image by itself says so (distribution-spec, "Pushing Manifests with Subject").
        if !answer.contains_key("oci-subject") {
            let listed = list(session, subject.digest, own, meter).await;
            listed.map_err(|error| PushError::of_fetch(target, error))?;
        }
        Ok(Published {
            artifact: own.digest,
            packed_bytes: packs.iter().map(|(blob, _)| blob.size).sum(),
            plain_bytes: *plain_bytes,
        })
    }
}

/// Lists the artifact under the image's referrers tag.
async fn list(
    session: &Session,
    subject: Digest,
    artifact: Blob,
    meter: &Meter,
) -> Result<(), FetchError> {
    let before = find::tagged(session, subject, meter).await?;
    let list = artifact::with_artifact(before.as_deref(), artifact);
    let tag = artifact::referrers_tag(subject);
    upload::manifest(session, &tag, OCI_INDEX, list).await?;
    Ok(())
}
