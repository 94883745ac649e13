//! What `docker save` and `skopeo copy ... docker-archive:` write: `manifest.json`, and no digests of the files.

use super::digest::Digest;
use super::json::DockerImage;
use super::oci::{Chosen, Layer, MAX_JSON, OciError, open_config, parse, same_name};
use super::source::Source;

/// Chooses the image; among several by `wanted`.
pub(super) fn choose(source: &Source, wanted: Option<&str>) -> Result<Chosen, OciError> {
    let mut images: Vec<DockerImage> =
        parse("manifest.json", &source.small("manifest.json", MAX_JSON)?)?;
    let tags = |image: &DockerImage| image.repo_tags.clone().unwrap_or_default();
    if images.len() > 1 {
        let found = images
            .iter()
            .flat_map(tags)
            .take(20)
            .collect::<Vec<_>>()
            .join(", ");
        if let Some(wanted) = wanted {
            images.retain(|image| tags(image).iter().any(|tag| same_name(tag, wanted)));
        }
        if images.len() != 1 {
            return Err(OciError::Ambiguous { found });
        }
    }
    let image = images.pop().ok_or(OciError::Empty)?;
    let name = tags(&image).into_iter().next();
    let bytes = source.small(&image.config, MAX_JSON)?;
    let (diff_ids, process) = open_config(parse(&image.config, &bytes)?, image.layers.len())?;
    // There is no manifest to take the digest of. The configuration names every layer by its diff_id, so its
    // digest (docker's own image ID) tells as much.
    let manifest = Digest::of(&bytes);
    let layers = image
        .layers
        .into_iter()
        .zip(diff_ids)
        .map(|(file, diff_id)| Layer {
            file,
            blob: None,
            diff_id,
        });
    Ok(Chosen {
        manifest,
        name,
        layers: layers.collect(),
        config: process,
    })
}
