//! What the VM boots: Debian's cloud kernel, and an initramfs with our agent as its PID 1.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::project::Project;
use crate::{cmd, deb};

/// The metapackage whose dependency names the current kernel.
const KERNEL: &str = "linux-image-cloud-amd64";
/// The agent is built for an explicit target, so that `+crt-static` does not reach build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Makes sure that kernel, modules and initramfs are in the guest folder and fresh.
///
/// # Errors
/// The kernel cannot be downloaded, or the agent does not build.
pub fn ensure(project: &Project, no_install: bool) -> Result<()> {
    if no_install {
        print_plan(project);
        return Ok(());
    }
    kernel(project)?;
    let agent = agent(project)?;
    initramfs(project, &agent)
}

fn print_plan(project: &Project) {
    if kernel_stamp_is_fresh(project) {
        return;
    }
    println!(
        "would run: apt-get download $(the linux-image that {KERNEL} depends on), and unpack it into {}",
        project.short(&project.guest_dir())
    );
    println!("would run: {}", cmd::show(&agent_build(project)));
}

/// The modules that setup copied, in the order in which the agent loads them.
pub fn modules(project: &Project) -> Vec<PathBuf> {
    vm_runtime::initramfs::MODULES
        .iter()
        .map(|name| {
            project
                .guest_dir()
                .join("modules")
                .join(format!("{name}.ko"))
        })
        .collect()
}

/// Which modules the kernel folder was made for: a longer list makes it stale.
fn stamp_text() -> String {
    format!("{KERNEL}\n{}\n", vm_runtime::initramfs::MODULES.join("\n"))
}

fn kernel_stamp_is_fresh(project: &Project) -> bool {
    std::fs::read_to_string(project.guest_dir().join("kernel.stamp"))
        .is_ok_and(|stamp| stamp == stamp_text())
        && project.kernel().is_file()
        && modules(project).iter().all(|module| module.is_file())
}

fn kernel(project: &Project) -> Result<()> {
    if kernel_stamp_is_fresh(project) {
        return Ok(());
    }
    let dir = project.guest_dir();
    std::fs::create_dir_all(dir.join("modules"))
        .with_context(|| format!("cannot create {}", dir.display()))?;
    let concrete = deb::dependency(KERNEL, "linux-image-")?;
    println!("setup: the guest's kernel: {concrete}");
    let tree = dir.join("unpacked");
    let _ = std::fs::remove_dir_all(&tree);
    deb::unpack(&deb::download(&concrete, &dir.join("packages"))?, &tree)?;
    let version = concrete.trim_start_matches("linux-image-").to_owned();
    let image = tree.join("boot").join(format!("vmlinuz-{version}"));
    std::fs::copy(&image, project.kernel())
        .with_context(|| format!("{concrete} has no {}", image.display()))?;
    let found = module_files(&tree)?;
    for (name, target) in vm_runtime::initramfs::MODULES.iter().zip(modules(project)) {
        let file = found
            .iter()
            .find(|file| module_name(file).as_deref() == Some(&name.replace('-', "_")))
            .with_context(|| format!("{concrete} has no kernel module {name}"))?;
        copy_module(file, &target)?;
    }
    std::fs::write(dir.join("kernel.version"), format!("{version}\n"))?;
    std::fs::write(dir.join("kernel.stamp"), stamp_text())?;
    std::fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))
}

/// All module files of an unpacked kernel package (`lib/modules`, or `usr/lib/modules` in newer ones).
fn module_files(tree: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut queue = vec![tree.join("lib/modules"), tree.join("usr/lib/modules")];
    while let Some(dir) = queue.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot list {}", dir.display()))?;
            if entry.file_type()?.is_dir() {
                queue.push(entry.path())
            } else {
                found.push(entry.path())
            }
        }
    }
    Ok(found)
}

/// `virtio_net` for `.../virtio_net.ko` and `.../virtio-net.ko.xz`.
fn module_name(file: &Path) -> Option<String> {
    let name = file.file_name()?.to_str()?;
    let stem = name
        .strip_suffix(".xz")
        .unwrap_or(name)
        .strip_suffix(".ko")?;
    Some(stem.replace('-', "_"))
}

fn copy_module(file: &Path, target: &Path) -> Result<()> {
    if file.extension().is_some_and(|extension| extension == "xz") {
        // Later Debian releases compress modules; the agent loads plain ones.
        let output = cmd::command("xz", ["-dc"])
            .arg(file)
            .output()
            .context("cannot start xz: install xz-utils")?;
        anyhow::ensure!(
            output.status.success(),
            "xz cannot unpack {}",
            file.display()
        );
        return std::fs::write(target, output.stdout)
            .with_context(|| format!("cannot write {}", target.display()));
    }
    std::fs::copy(file, target)
        .map(drop)
        .with_context(|| format!("cannot copy {}", file.display()))
}

/// Makes sure that a static busybox is there; returns its path.
///
/// # Errors
/// Its package cannot be downloaded.
pub fn busybox(project: &Project) -> Result<PathBuf> {
    let target = project.busybox();
    if target.is_file() {
        return Ok(target);
    }
    let (packages, tree) = (
        project.guest_dir().join("packages"),
        project.guest_dir().join("unpacked"),
    );
    deb::unpack(&deb::download("busybox-static", &packages)?, &tree)?;
    let program = [tree.join("bin/busybox"), tree.join("usr/bin/busybox")]
        .into_iter()
        .find(|path| path.is_file())
        .context("busybox-static has no busybox")?;
    std::fs::rename(&program, &target)
        .with_context(|| format!("cannot write {}", target.display()))?;
    std::fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))?;
    Ok(target)
}

fn agent_build(project: &Project) -> std::process::Command {
    let mut build = cmd::cargo(
        project,
        [
            "build",
            "--release",
            "-p",
            "guest-agent",
            "--bin",
            "guest-agent",
            "--target",
            TARGET,
            "--target-dir",
        ],
    );
    build.arg(project.target.join("guest-agent"));
    build
        .env(
            "RUSTFLAGS",
            "-C target-feature=+crt-static -C strip=symbols",
        )
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    build
}

/// Builds the agent as one static program.
fn agent(project: &Project) -> Result<PathBuf> {
    let program = project
        .target
        .join("guest-agent")
        .join(TARGET)
        .join("release/guest-agent");
    let mut build = agent_build(project);
    if program.exists() {
        build.arg("--quiet");
    } else {
        println!("setup: building the guest's agent");
    }
    cmd::run(&mut build).context("the guest's agent does not build")?;
    Ok(program)
}

/// Writes the initramfs only if its content changed: both nodes compare it by digest, and a running VM may have it open.
fn initramfs(project: &Project, agent: &Path) -> Result<()> {
    let fresh = project.guest_dir().join("initramfs.new");
    vm_runtime::initramfs::build(agent, &modules(project), &fresh)
        .context("the initramfs cannot be built")?;
    let target = project.initramfs();
    if std::fs::read(&target).is_ok_and(|old| std::fs::read(&fresh).is_ok_and(|new| old == new)) {
        std::fs::remove_file(&fresh)?;
        return Ok(());
    }
    println!("setup: a new initramfs");
    std::fs::rename(&fresh, &target).with_context(|| format!("cannot write {}", target.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_names_are_compared_as_the_kernel_does() {
        assert_eq!(
            module_name(Path::new("a/virtio-net.ko.xz")).as_deref(),
            Some("virtio_net")
        );
        assert_eq!(
            module_name(Path::new("a/overlay.ko")).as_deref(),
            Some("overlay")
        );
        assert_eq!(module_name(Path::new("a/modules.builtin")), None);
    }
}
