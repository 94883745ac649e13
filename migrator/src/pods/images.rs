//! A pod's images, served to its VMM.
//!
//! Image `N` of the VM's specification has its socket at `pods/NAME/iN.nbd`. What of it is not on this node is fetched when it is read.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vm_runtime::spec::VmSpec;

use super::error::{Cause, PodError};
use crate::api::types::ImageInfo;
use crate::block::Export;
use crate::block::nbd::Server;
use crate::daemon::node::Node;
use crate::image::{Digest, ImageExport};

/// An image of a pod, served until this is dropped.
#[derive(Debug)]
pub struct PodImage {
    /// What the VMM reads.
    pub export: Arc<ImageExport>,
    _server: Server,
}

impl PodImage {
    pub(super) fn info(&self) -> ImageInfo {
        let chunks = self.export.chunks();
        let record = self.export.record();
        let waiting = chunks.waiting(record);
        ImageInfo {
            name: record.name.clone(),
            size_bytes: record.erofs_size,
            here_bytes: chunks.bytes_here(record),
            waiting: waiting.len(),
            problem: waiting.into_iter().find_map(|waiting| waiting.problem),
        }
    }
}

impl Drop for PodImage {
    fn drop(&mut self) {
        // Who waits for a chunk waits no more.
        self.export.close();
    }
}

/// Where the VMM finds each image, in order.
pub(super) fn sockets(dir: &Path, vm: &VmSpec) -> impl Iterator<Item = PathBuf> {
    (0..vm.disks.len()).map(|at| socket(dir, at))
}

fn socket(dir: &Path, at: usize) -> PathBuf {
    dir.join(format!("i{at}.nbd"))
}

/// Begins to serve a pod's images, in the order of its VM's specification.
///
/// # Errors
/// An image is not on this node, or a socket cannot be made.
pub(super) async fn serve(
    node: &Node,
    pod: &str,
    dir: &Path,
    vm: &VmSpec,
) -> Result<Vec<Arc<PodImage>>, PodError> {
    let images = Arc::clone(&node.images);
    let digests: Vec<String> = vm.disks.iter().map(|d| d.image_digest.clone()).collect();
    let dir = dir.to_owned();
    let serve = move |(at, text): (usize, &String)| -> Result<Arc<PodImage>, Cause> {
        let digest: Digest = text.parse()?;
        let path = socket(&dir, at);
        let export = Arc::new(images.export(&digest, path.clone())?);
        let server = Server::start(Export::Image(export.clone()), &path)?;
        Ok(Arc::new(PodImage {
            export,
            _server: server,
        }))
    };
    let all = move || {
        digests
            .iter()
            .enumerate()
            .map(serve)
            .collect::<Result<_, _>>()
    };
    tokio::task::spawn_blocking(all)
        .await
        .map_err(|e| PodError::step(pod, "serve its images", e))?
        .map_err(|e: Cause| PodError::step(pod, "serve its images", e))
}
