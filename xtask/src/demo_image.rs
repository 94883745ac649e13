//! The demo's container image, an OCI layout made from Debian packages: busybox, iperf3 with its libraries; and of the
//! workloads of this crate: a UDP echo, and the workloads of the soak tests.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::project::Project;
use crate::{cmd, deb, guest, oci};

/// The name under which the image is imported.
pub const REFERENCE: &str = "demo:latest";

/// Holds every program of the image that is not static, and what it may need; the loader picks from these.
const PACKAGES: &[&str] = &[
    "iperf3",
    "libiperf0",
    "libsctp1",
    "libssl3",
    "libc6",
    "zlib1g",
];

/// The path that programs name as their interpreter (System V ABI, AMD64 supplement).
const LOADER: &str = "lib64/ld-linux-x86-64.so.2";

/// Programs of this crate that the image holds.
const WORKLOADS: [&str; 3] = ["udp-echo", "memory-check", "flows"];

/// What makes the image: a change here, or of a workload's source, makes it anew.
fn stamp() -> String {
    oci::digest(
        [
            include_str!("demo_image.rs"),
            include_str!("oci.rs"),
            include_str!("bin/udp-echo.rs"),
            include_str!("bin/memory-check.rs"),
            include_str!("bin/flows/main.rs"),
            include_str!("bin/flows/counters.rs"),
            include_str!("bin/flows/receiver.rs"),
            include_str!("bin/flows/sender.rs"),
            include_str!("bin/flows/sockets.rs"),
            include_str!("bin/flows/streams.rs"),
            include_str!("soak/flows/kind.rs"),
            include_str!("soak/flows/tally.rs"),
            include_str!("soak/blocks.rs"),
            include_str!("soak/stream.rs"),
        ]
        .concat()
        .as_bytes(),
    )
}

/// Makes sure that the layout is there; returns its folder.
///
/// # Errors
/// A package cannot be downloaded, or a library is missing.
pub fn ensure(project: &Project) -> Result<PathBuf> {
    let layout = project.demo_image();
    let mark = project.target.join("demo-image.stamp");
    if layout.join("index.json").is_file()
        && WORKLOADS
            .iter()
            .all(|name| program(project, name).is_file())
        && std::fs::read_to_string(&mark).is_ok_and(|text| text == stamp())
    {
        return Ok(layout);
    }
    println!("demo: the container image");
    let work = project.target.join("demo-image.work");
    let _ = std::fs::remove_dir_all(&work);
    let packages = project.target.join("demo-packages");
    let layers = vec![
        busybox(project)?,
        iperf3(&work, &packages)?,
        programs(project, &work, &WORKLOADS)?,
    ];
    for name in WORKLOADS {
        let path = program(project, name);
        let folder = path.parent().context("a program without a folder")?;
        std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::rename(work.join(name), &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let fresh = work.join("layout");
    oci::write(
        &fresh,
        REFERENCE,
        layers,
        &json!({
            "Env": ["PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": ["/bin/sh"],
            "WorkingDir": "/",
        }),
    )?;
    let _ = std::fs::remove_dir_all(&layout);
    std::fs::rename(&fresh, &layout)
        .with_context(|| format!("cannot write {}", layout.display()))?;
    std::fs::write(&mark, stamp())?;
    std::fs::remove_dir_all(&work)?;
    Ok(layout)
}

/// A workload of the image as a program of this machine: it is static.
pub fn program(project: &Project, name: &str) -> PathBuf {
    project.target.join("demo-programs").join(name)
}

/// The first layer: busybox, its applets, and the files that a small system has.
pub(crate) fn busybox(project: &Project) -> Result<oci::Layer> {
    let program = guest::busybox(project)?;
    let mut layer = oci::Layer::default();
    for (path, mode) in [
        ("bin", 0o755),
        ("sbin", 0o755),
        ("usr", 0o755),
        ("usr/bin", 0o755),
        ("usr/sbin", 0o755),
        ("etc", 0o755),
        ("root", 0o700),
        ("tmp", 0o1777),
        ("var", 0o755),
        ("var/tmp", 0o1777),
        ("proc", 0o555),
        ("sys", 0o555),
        ("dev", 0o755),
        ("run", 0o755),
        ("home", 0o755),
    ] {
        layer.dir(path, mode)?;
    }
    layer.file("bin/busybox", 0o755, &std::fs::read(&program)?)?;
    let applets = cmd::output(cmd::command("env", ["-i"]).arg(&program).arg("--list-full"))?;
    for applet in applets
        .lines()
        .filter(|applet| *applet != "bin/busybox" && applet.contains('/'))
    {
        layer.symlink(applet, "/bin/busybox")?;
    }
    layer.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    )?;
    layer.file("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?;
    layer.file("etc/hosts", 0o644, b"127.0.0.1 localhost\n::1 localhost\n")?;
    layer.file(
        "etc/nsswitch.conf",
        0o644,
        b"passwd: files\ngroup: files\nhosts: files dns\n",
    )?;
    Ok(layer)
}

fn iperf3(work: &Path, packages: &Path) -> Result<oci::Layer> {
    let tree = work.join("iperf3");
    for package in PACKAGES {
        deb::unpack(&deb::download(package, packages)?, &tree)?;
    }
    let mut layer = oci::Layer::default();
    let mut dirs = BTreeSet::new();
    let program = "usr/bin/iperf3";
    let mut files: BTreeSet<String> = libraries(&tree, program)?;
    files.insert(program.to_owned());
    files.insert(LOADER.to_owned());
    for file in &files {
        let parents: Vec<&Path> = Path::new(file)
            .ancestors()
            .skip(1)
            .filter(|dir| !dir.as_os_str().is_empty())
            .collect();
        for dir in parents.iter().rev() {
            let dir = dir.to_str().context("a path that is not UTF-8")?;
            if dirs.insert(dir.to_owned()) {
                layer.dir(dir, 0o755)?;
            }
        }
        // A library's versioned name may be a link: the content goes under the name that the loader asks for.
        // The loader's own is an absolute link, which must not lead out of the tree.
        let source = if file == LOADER {
            tree.join("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
        } else {
            tree.join(file)
        };
        let data = std::fs::read(&source)
            .with_context(|| format!("cannot read {file} of {PACKAGES:?}"))?;
        layer.file(file, 0o755, &data)?;
    }
    Ok(layer)
}

/// The libraries that the unpacked loader finds for `program` inside the unpacked tree, as paths in the image.
fn libraries(tree: &Path, program: &str) -> Result<BTreeSet<String>> {
    let folders =
        ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"].map(|folder| tree.join(folder));
    let search = folders
        .iter()
        .map(|folder| folder.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(":");
    let loader = folders[0].join("ld-linux-x86-64.so.2");
    let mut list = std::process::Command::new(&loader);
    list.arg("--inhibit-cache")
        .arg("--library-path")
        .arg(&search)
        .arg("--list")
        .arg(tree.join(program));
    let listing = cmd::output(&mut list).context("the loader cannot list iperf3's libraries")?;
    let mut found = BTreeSet::new();
    for line in listing.lines() {
        let Some((name, path)) = line.trim().split_once(" => ") else {
            continue;
        };
        let path = path.split(" (").next().unwrap_or(path);
        match Path::new(path).strip_prefix(tree) {
            Ok(inside) => found.insert(inside.to_string_lossy().into_owned()),
            Err(_) if name.contains("ld-linux") => continue,
            Err(_) => bail!("iperf3 needs {name}, which {PACKAGES:?} do not hold: add its package"),
        };
    }
    Ok(found)
}

/// A layer with programs of `xtask/src/bin` in /usr/local/bin, each static.
pub(crate) fn programs(project: &Project, work: &Path, names: &[&str]) -> Result<oci::Layer> {
    std::fs::create_dir_all(work).with_context(|| format!("cannot create {}", work.display()))?;
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut layer = oci::Layer::default();
    layer.dir("usr/local", 0o755)?;
    layer.dir("usr/local/bin", 0o755)?;
    for name in names {
        let program = work.join(name);
        // Not cargo: that would build all of xtask's dependencies once more, statically.
        let mut build = std::process::Command::new(&rustc);
        build.current_dir(&project.root).args([
            "--edition",
            "2024",
            "-O",
            "-C",
            "target-feature=+crt-static",
            "-C",
            "strip=symbols",
            "-o",
        ]);
        // As cargo finds it: one file, or a folder of them.
        let source = [
            format!("xtask/src/bin/{name}.rs"),
            format!("xtask/src/bin/{name}/main.rs"),
        ]
        .into_iter()
        .find(|source| project.root.join(source).is_file())
        .with_context(|| format!("xtask/src/bin has no {name}"))?;
        cmd::run(build.arg(&program).arg(source))?;
        anyhow::ensure!(
            std::fs::metadata(&program)?.permissions().mode() & 0o111 != 0,
            "rustc left no program"
        );
        let path = format!("usr/local/bin/{name}");
        layer.file(&path, 0o755, &std::fs::read(&program)?)?;
    }
    Ok(layer)
}
