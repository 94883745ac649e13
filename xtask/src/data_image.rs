//! A container image with as much data as is asked for: what images that are fetched on demand are tested and measured with.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::json;

use crate::project::Project;
use crate::{demo_image, oci};

/// The name under which it is imported. It has what the tests' pods run of the demo's image.
pub const REFERENCE: &str = "data:latest";
/// Where its data is.
pub const FOLDER: &str = "data";
/// Bytes of a file.
const FILE: usize = 1 << 20;

/// The name and the content of each file of an image with so many MiB of data; none is like another.
fn file(number: u32) -> (String, Vec<u8>) {
    // xorshift64 (Marsaglia 2003): what no compressor makes smaller.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(u64::from(number) + 1);
    let mut data = Vec::with_capacity(FILE);
    while data.len() < FILE {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend(state.to_le_bytes());
    }
    (format!("{number:05}"), data)
}

/// What `sha256sum /data/*` prints in a pod of an image with so many MiB of data.
pub fn sums(mib: u32) -> String {
    (0..mib)
        .map(|number| {
            let (name, data) = file(number);
            let digest = oci::digest(&data);
            let hex = digest.trim_start_matches("sha256:");
            format!("{hex}  /{FOLDER}/{name}\n")
        })
        .collect()
}

/// Makes sure that the layout of an image with so many MiB of data is there; returns its folder.
///
/// # Errors
/// It cannot be written.
pub fn ensure(project: &Project, mib: u32) -> Result<PathBuf> {
    demo_image::ensure(project)?;
    let layout = project.target.join(format!("data-image-{mib}"));
    if layout.join("index.json").is_file() {
        return Ok(layout);
    }
    let work = project.target.join(format!("data-image-{mib}.work"));
    let _ = std::fs::remove_dir_all(&work);
    let mut data = oci::Layer::default();
    for folder in ["usr/local", "usr/local/bin", FOLDER] {
        data.dir(folder, 0o755)?;
    }
    let echo = demo_image::program(project, "udp-echo");
    let echo = std::fs::read(&echo).with_context(|| format!("cannot read {}", echo.display()))?;
    data.file("usr/local/bin/udp-echo", 0o755, &echo)?;
    for number in 0..mib {
        let (name, content) = file(number);
        data.file(&format!("{FOLDER}/{name}"), 0o644, &content)?;
    }
    let layers = vec![demo_image::busybox(project)?, data];
    oci::write(
        &work,
        REFERENCE,
        layers,
        &json!({
            "Env": ["PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": ["/bin/sh"],
            "WorkingDir": "/",
        }),
    )?;
    std::fs::rename(&work, &layout)
        .with_context(|| format!("cannot write {}", layout.display()))?;
    Ok(layout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_differ_and_are_the_same_each_time() {
        let (name, data) = file(3);
        assert_eq!((name.as_str(), data.len()), ("00003", FILE));
        assert_eq!(file(3).1, data);
        assert_ne!(file(4).1, data);
        assert_ne!(data[..8], data[8..16]);
        let sums = sums(2);
        assert_eq!(sums.lines().count(), 2);
        assert!(sums.ends_with("  /data/00001\n"), "{sums}");
    }
}
