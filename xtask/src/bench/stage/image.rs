//! The container image of the benchmarks' pods: busybox, the demo's UDP echo, and the load.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::json;

use crate::project::Project;
use crate::{demo_image, oci};

/// The name under which it is imported.
pub(super) const REFERENCE: &str = "bench:latest";

/// What makes the image: a change here, or of a program's source, makes it anew.
fn stamp() -> String {
    oci::digest(
        [
            include_str!("image.rs"),
            include_str!("../../demo_image.rs"),
            include_str!("../../oci.rs"),
            include_str!("../../bin/udp-echo.rs"),
            include_str!("../../bin/memory-load/main.rs"),
            include_str!("../../bin/memory-load/disk.rs"),
            include_str!("../../bin/memory-load/histogram.rs"),
        ]
        .concat()
        .as_bytes(),
    )
}

/// Makes sure that the OCI layout is there; returns its folder.
///
/// # Errors
/// busybox cannot be downloaded, or a program does not build.
pub(super) fn ensure(project: &Project) -> Result<PathBuf> {
    let layout = project.target.join("bench-image");
    let mark = project.target.join("bench-image.stamp");
    if layout.join("index.json").is_file()
        && std::fs::read_to_string(&mark).is_ok_and(|text| text == stamp())
    {
        return Ok(layout);
    }
    println!("bench: the container image");
    let work = project.target.join("bench-image.work");
    let _ = std::fs::remove_dir_all(&work);
    let programs = demo_image::programs(project, &work, &["udp-echo", "memory-load"])?;
    let fresh = work.join("layout");
    oci::write(
        &fresh,
        REFERENCE,
        vec![demo_image::busybox(project)?, programs],
        &json!({ "Cmd": ["/bin/sh"], "WorkingDir": "/" }),
    )?;
    let _ = std::fs::remove_dir_all(&layout);
    std::fs::rename(&fresh, &layout)
        .with_context(|| format!("cannot write {}", layout.display()))?;
    std::fs::write(&mark, stamp())?;
    std::fs::remove_dir_all(&work)?;
    Ok(layout)
}
