//! Images from a real registry. Needs root, docker-registry, skopeo, umoci, buildah and mkfs.erofs.

mod auth;
mod chunk_faults;
mod chunks;
mod faults;
mod keep;
mod lazy;
mod lies;
mod pull;

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use migrator::config;
use migrator::image::ImageStore;
use migrator::registry::{
    Meter, Progress, PullError, PullOptions, Pulled, PushError, PushOptions, Pushed, Registries,
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// A node's part that pulls, with a store of its own.
struct Puller {
    registries: Registries,
    store: Arc<ImageStore>,
    dir: TempDir,
}

impl Puller {
    fn new() -> Result<Self> {
        Self::with("{}")
    }

    /// With a `registries` section of the configuration.
    fn with(yaml: &str) -> Result<Self> {
        let dir = TempDir::new()?;
        let store = Arc::new(ImageStore::open(&dir.path().join("images"))?);
        let config: config::Registries = serde_yaml_ng::from_str(yaml)?;
        Ok(Self {
            registries: Registries::new(config, Arc::clone(&store)),
            store,
            dir,
        })
    }

    /// As after a restart of the service.
    fn restarted(self) -> Result<Self> {
        let Self {
            registries,
            store,
            dir,
        } = self;
        drop((registries, store));
        let store = Arc::new(ImageStore::open(&dir.path().join("images"))?);
        Ok(Self {
            registries: Registries::new(config::Registries::default(), Arc::clone(&store)),
            store,
            dir,
        })
    }

    fn pull(&self, reference: &str, options: &PullOptions) -> Result<Pulled, PullError> {
        self.told(reference, options).0
    }

    /// Without TLS, as most of these registries are.
    fn plain(&self, reference: &str) -> Result<Pulled, PullError> {
        self.pull(reference, &plain())
    }

    /// The result, and the last that was told.
    fn told(
        &self,
        reference: &str,
        options: &PullOptions,
    ) -> (Result<Pulled, PullError>, Progress) {
        let runtime = runtime();
        let reference = reference.parse().expect("a reference");
        let (meter, progress) = Meter::new();
        let never = CancellationToken::new();
        let pulled = runtime.block_on(self.registries.pull(&reference, options, &meter, &never));
        let told = progress.borrow().clone();
        (pulled, told)
    }

    fn push(&self, image: &str, to: &str, options: &PushOptions) -> Result<Pushed, PushError> {
        let to = to.parse().expect("a reference");
        let (meter, _progress) = Meter::new();
        let never = CancellationToken::new();
        runtime().block_on(self.registries.push(image, &to, options, &meter, &never))
    }

    /// The blobs of a kind that are here: `blobs` or `partial`.
    fn content(&self, kind: &str) -> Result<Vec<u64>> {
        let folder = self.dir.path().join("images/content").join(kind);
        let mut sizes = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            sizes.push(entry?.metadata()?.len());
        }
        Ok(sizes)
    }

    /// The store is as it was made: no image, and nothing begun.
    fn is_empty(&self) -> Result<bool> {
        let nothing_begun = std::fs::read_dir(self.dir.path().join("images"))?
            .filter_map(Result::ok)
            .all(|entry| !entry.file_name().to_string_lossy().starts_with(".tmp"));
        Ok(self.store.list().is_empty() && self.content("blobs")?.is_empty() && nothing_begun)
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}

fn plain() -> PullOptions {
    PullOptions {
        plain_http: true,
        ..PullOptions::default()
    }
}

/// The error with its causes, as a user reads it.
fn words(error: &(dyn std::error::Error + 'static)) -> String {
    migrator::api::error::chain(error)
}

fn oci(layout: &Path) -> String {
    format!("oci:{}:latest", layout.display())
}
