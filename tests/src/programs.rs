//! The eBPF programs over maps of their own.

use aya::{Ebpf, EbpfLoader};
use nix::mount::{MsFlags, mount};

use crate::netns::{BpfDir, require_root};

/// Reads them in, with maps that are pinned in a folder of this test's; they are attached to nothing.
///
/// # Errors
/// The kernel refuses.
///
/// # Panics
/// Not root.
pub fn load() -> anyhow::Result<(BpfDir, Ebpf)> {
    require_root();
    let dir = BpfDir::new()?;
    let none: Option<&str> = None;
    mount(Some("bpf"), dir.path(), Some("bpf"), MsFlags::empty(), none)?;
    let programs = EbpfLoader::new()
        .default_map_pin_directory(dir.path())
        .load(migrator::network::PROGRAMS)?;
    Ok((dir, programs))
}
