//! The image that is started: much that nobody reads, and a program that reads a sixteenth of it and prints a line.
//!
//! 6.4 % is what containers of public images read of them when they start (Harter et al., "Slacker", FAST 2016).

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::json;

use crate::project::Project;
use crate::{demo_image, oci};

/// What the program prints.
pub(super) const LINE: &str = "started";

/// The pod's name.
pub(super) const POD: &str = "start";

/// Which part of the image the program reads.
const HOT: u32 = 16;
/// Sizes of files in KiB, in turn.
const FILES: [usize; 5] = [16, 64, 256, 1024, 4096];
/// Size of a layer in MiB.
const LAYER: u32 = 128;

/// What makes the image: a change here makes it anew.
fn stamp(mib: u32) -> String {
    let code = [
        include_str!("layout.rs"),
        include_str!("../../../../oci.rs"),
        &mib.to_string(),
    ]
    .concat();
    oci::digest(code.as_bytes())
}

/// Makes sure that the OCI layout is there; returns its folder.
///
/// # Errors
/// busybox cannot be downloaded, or the disk is full.
pub(super) fn ensure(project: &Project, mib: u32) -> Result<PathBuf> {
    let layout = project.target.join(format!("bench-start-{mib}"));
    let mark = project.target.join(format!("bench-start-{mib}.stamp"));
    if layout.join("index.json").is_file()
        && std::fs::read_to_string(&mark).is_ok_and(|text| text == stamp(mib))
    {
        return Ok(layout);
    }
    println!("bench: an image of {mib} MiB");
    let fresh = project.target.join(format!("bench-start-{mib}.work"));
    for old in [&fresh, &layout] {
        if old.exists() {
            std::fs::remove_dir_all(old)
                .with_context(|| format!("cannot remove {}", old.display()))?;
        }
    }
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    let mut layers = vec![demo_image::busybox(project)?];
    let hot = mib / HOT;
    layers.push(filled("hot", hot, &mut noise)?);
    let mut left = mib - hot;
    while left > 0 {
        let size = left.min(LAYER);
        layers.push(filled(&format!("cold-{left}"), size, &mut noise)?);
        left -= size;
    }
    let program = format!("cat /hot/* >/dev/null; echo {LINE}; exec sleep 1d");
    let config = json!({ "Cmd": ["/bin/sh", "-c", program], "WorkingDir": "/" });
    oci::write(&fresh, "latest", layers, &config)?;
    std::fs::rename(&fresh, &layout)
        .with_context(|| format!("cannot write {}", layout.display()))?;
    std::fs::write(&mark, stamp(mib))?;
    Ok(layout)
}

/// A folder of so many MiB, in files of many sizes.
fn filled(folder: &str, mib: u32, noise: &mut Noise) -> Result<oci::Layer> {
    let mut layer = oci::Layer::default();
    layer.dir(folder, 0o755)?;
    let mut left = mib as usize * 1024;
    for (number, size) in FILES.into_iter().cycle().enumerate() {
        if left == 0 {
            break;
        }
        let size = size.min(left);
        layer.file(
            &format!("{folder}/{number}"),
            0o644,
            &noise.bytes(size * 1024),
        )?;
        left -= size;
    }
    Ok(layer)
}

/// The pod's file; it may start from the template of its shape, or must not.
pub(super) fn pod(image: &str, template: bool) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {POD}
  annotations:
    migrator/ipv4: 10.77.0.42/24
    migrator/template: \"{template}\"
spec:
  restartPolicy: Never
  containers:
    - name: start
      image: {image}
      resources: {{ limits: {{ memory: 128Mi, cpu: \"1\" }} }}
"
    )
}

/// Bytes that do not compress, the same each time (xorshift64*, Vigna 2016).
struct Noise(u64);

impl Noise {
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            bytes.extend_from_slice(&self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_is_one_and_noise_is_the_same_each_time() {
        let spec =
            vm_runtime::pod::PodSpec::from_yaml(&pod("10.0.0.1:5000/start:1", false)).unwrap();
        assert_eq!(spec.containers.len(), 1);
        assert!(spec.cold_start);
        let (mut one, mut other) = (Noise(1), Noise(1));
        assert_eq!(one.bytes(100), other.bytes(100));
        assert_ne!(one.bytes(8), other.bytes(16)[8..]);
    }
}
