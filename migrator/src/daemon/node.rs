//! What a running service has: opened once, shared by everything it does.

use std::path::PathBuf;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use vm_runtime::qemu::QemuBinary;
use vm_runtime::spec::Accel;

use crate::config::Config;
use crate::daemon::migrations::MigrationRegistry;
use crate::directory::Directory;
use crate::image::ImageStore;
use crate::migration::driver::Arrivals;
use crate::migration::journal::Journal;
use crate::network::NodeNetwork;
use crate::pods::PodRegistry;
use crate::registry::Registries;
use crate::storage::Storage;
use crate::supply::Supply;
use crate::templates::Templates;
use crate::volumes::Volumes;
use crate::wire::tls::TlsConfig;

/// A node's service.
#[derive(Debug)]
pub struct Node {
    /// What it was told.
    pub config: Config,
    /// Images. Its calls block.
    pub images: Arc<ImageStore>,
    /// What brings the chunks that images lack.
    pub supply: Supply,
    /// Named volumes. Its calls block.
    pub volumes: Volumes,
    /// Saved guests that pods start from. Its calls block.
    pub templates: Arc<Templates>,
    /// Storage that other nodes see, too. Its calls block.
    pub storage: Arc<Storage>,
    /// Where images come from.
    pub registries: Registries,
    /// The bridge, the gates.
    pub network: NodeNetwork,
    /// The VMM.
    pub qemu: QemuBinary,
    /// Machine type of new pods.
    pub machine: String,
    /// What runs guests.
    pub accel: Accel,
    /// Why that one.
    pub accel_reason: String,
    /// What guests boot from.
    pub guest: GuestFiles,
    /// This node's identity.
    pub tls: TlsConfig,
    /// Whose pods are, and how far migrations got. Its calls block for the time of an fsync.
    pub journal: Arc<Journal>,
    /// What the nodes of a routed cluster tell each other; nothing on a bridge.
    pub directory: Option<Directory>,
    /// The pods.
    pub pods: PodRegistry,
    /// The migrations, past ones too.
    pub migrations: MigrationRegistry,
    /// Migrations to here that wait for a source which lost its link.
    pub arrivals: Arrivals,
    /// Cancelled once the pods of an earlier service are found again: from then on it is known what is taken.
    pub found: CancellationToken,
    /// Cancelled when the service is to end: tasks end, VMs go on.
    pub shutdown: CancellationToken,
    /// Every task that the service waits for at its end.
    pub tasks: TaskTracker,
}

/// The guest's kernel and initramfs, with the digests that both nodes compare.
#[derive(Clone, Debug)]
pub struct GuestFiles {
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initramfs.
    pub initramfs: PathBuf,
    /// SHA-256 of the kernel, hex.
    pub kernel_sha256: String,
    /// SHA-256 of the initramfs, hex.
    pub initramfs_sha256: String,
}

impl Node {
    /// The folder of the pods' folders.
    pub fn pods_dir(&self) -> PathBuf {
        self.config.state_dir.join("pods")
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        self.config.name.as_str()
    }
}
