//! A VM under the test's own hands, and what the tests do with its agent.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::timeout;
use vm_runtime::agent_client::{
    AgentClient, Configuration, Container, Exec, ExecSpec, Interface, OutputSink, PodSettings,
    Stream,
};
use vm_runtime::initramfs::CMDLINE;
use xtask::process::poll_until;

/// A boot under TCG on a crowded machine, and anything that waits for one.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Output by container and stream.
type Output = BTreeMap<(String, Stream), Vec<u8>>;

/// Keeps output in memory and refuses gaps.
#[derive(Default)]
pub(crate) struct Store(watch::Sender<Output>);

impl OutputSink for Store {
    fn append(&self, container: &str, stream: Stream, offset: u64, data: &[u8]) {
        self.0.send_modify(|map| {
            let bytes = map.entry((container.to_owned(), stream)).or_default();
            assert_eq!(
                offset,
                bytes.len() as u64,
                "a gap or a repetition in {container}"
            );
            bytes.extend_from_slice(data);
        });
    }

    fn last_offset(&self, container: &str, stream: Stream) -> u64 {
        stored(&self.0.borrow(), container, stream).len() as u64
    }
}

impl Store {
    pub(crate) fn text(&self, container: &str, stream: Stream) -> String {
        String::from_utf8_lossy(stored(&self.0.borrow(), container, stream)).into_owned()
    }

    pub(crate) async fn wait_for(&self, container: &str, wanted: &str) {
        let holds = |bytes: &[u8]| {
            let mut windows = bytes.windows(wanted.len());
            windows.any(|window| window == wanted.as_bytes())
        };
        assert!(
            self.wait_until(container, holds).await,
            "no `{wanted}` from {container}"
        );
    }

    /// Waits until a container's standard output is as wanted; false if it never is.
    pub(crate) async fn wait_until(&self, container: &str, wanted: impl Fn(&[u8]) -> bool) -> bool {
        let mut outputs = self.0.subscribe();
        let reached = outputs.wait_for(|map| wanted(stored(map, container, Stream::Stdout)));
        matches!(timeout(PATIENCE, reached).await, Ok(Ok(_)))
    }
}

fn stored<'a>(map: &'a Output, container: &str, stream: Stream) -> &'a [u8] {
    let bytes = map.get(&(container.to_owned(), stream));
    bytes.map_or(&[], Vec::as_slice)
}

/// A VM that ends with the test.
pub(crate) struct Guest {
    dir: Option<tempfile::TempDir>,
    pub(crate) qemu: Child,
}

impl Guest {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.as_ref().expect("not moved").path().join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("agent.sock")
    }

    pub(crate) fn console(&self) -> String {
        fs::read_to_string(self.path("console.log")).unwrap_or_default()
    }

    /// One command on a connection of its own.
    pub(crate) fn qmp(&self, command: &serde_json::Value) -> serde_json::Value {
        let path = self.path("qmp.sock");
        let mut socket = UnixStream::connect(&path);
        // A QEMU that has just started binds its socket first and listens a little later.
        poll_until(PATIENCE, || {
            if socket.is_err() {
                socket = UnixStream::connect(&path);
            }
            socket.is_ok()
        });
        let socket = socket.expect("QMP listens");
        socket.set_read_timeout(Some(PATIENCE)).expect("set");
        let mut lines = BufReader::new(&socket).lines();
        for request in [&serde_json::json!({"execute": "qmp_capabilities"}), command] {
            writeln!(&socket, "{request}").expect("written");
        }
        let mut answers = 0;
        loop {
            let line = lines.next().expect("an answer").expect("a line");
            let answer: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            answers += u32::from(answer.get("return").is_some());
            if answers == 2 {
                return answer["return"].clone();
            }
        }
    }

    /// Waits until the VM has ended by itself.
    pub(crate) async fn ended(&mut self) {
        // Before the first look, so that no end is missed.
        let mut ends = signal(SignalKind::child()).expect("a handler");
        let gone = async {
            while self.qemu.try_wait().expect("its own child").is_none() {
                ends.recv().await;
            }
        };
        timeout(PATIENCE, gone).await.expect("the VM powers off");
    }

    pub(crate) fn end(&mut self) {
        self.qemu.kill().ok();
        self.qemu.wait().ok();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() && self.dir.is_some() {
            eprintln!("the guest's console:\n{}", self.console());
        }
        self.end();
    }
}

pub(crate) fn guest_dir() -> PathBuf {
    std::env::var_os("MIGRATOR_GUEST_DIR")
        .expect("MIGRATOR_GUEST_DIR is not set: run this by `cargo xtask test`")
        .into()
}

pub(crate) fn image(dir: &Path) {
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("bin")).expect("made");
    fs::create_dir_all(tree.join("etc")).expect("made");
    fs::copy(guest_dir().join("busybox"), tree.join("bin/busybox")).expect("a static busybox");
    for applet in [
        "sh", "cat", "echo", "sleep", "ls", "id", "ps", "stty", "seq", "tail", "hostname", "ip",
        "kill", "true", "head", "wc", "tr", "mount", "awk", "nc", "date", "grep", "env", "pwd",
    ] {
        symlink("busybox", tree.join("bin").join(applet)).expect("linked");
    }
    fs::write(
        tree.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nweb:x:101:102::/srv:/bin/sh\n",
    )
    .expect("written");
    fs::write(
        tree.join("etc/group"),
        "root:x:0:\nweb:x:102:\nextra:x:7:web\n",
    )
    .expect("written");
    // As /var/run is in many images.
    fs::create_dir(tree.join("behind")).expect("made");
    symlink("behind", tree.join("link")).expect("linked");
    let out = dir.join("img0.erofs");
    let made = Command::new("mkfs.erofs")
        .arg(&out)
        .arg(&tree)
        .stdout(Stdio::null())
        .status()
        .expect("mkfs.erofs runs");
    assert!(made.success());
}

/// A new VM.
pub(crate) fn boot() -> Guest {
    let dir = tempfile::tempdir().expect("a folder");
    image(dir.path());
    start(dir, &[])
}

/// Moves the VM to a new process: the old one stops, its state crosses in a file, the new one loads it.
/// `frozen` runs between.
pub(crate) async fn relocate<T>(mut old: Guest, frozen: impl AsyncFnOnce() -> T) -> (Guest, T) {
    let state = old.path("state").display().to_string();
    old.qmp(&serde_json::json!({"execute": "stop"}));
    let result = frozen().await;
    let uri = format!("exec:cat > {state}");
    old.qmp(&serde_json::json!({"execute": "migrate", "arguments": {"uri": uri}}));
    let query = serde_json::json!({"execute": "query-migrate"});
    let saved = poll_until(PATIENCE, || {
        let info = old.qmp(&query);
        assert_ne!(info["status"], "failed", "QEMU: {info}");
        info["status"] == "completed"
    });
    assert!(saved, "QEMU does not save its state");
    old.end();
    let dir = old.dir.take().expect("still there");
    let new = start(dir, &["-incoming", &format!("exec:cat {state}")]);
    let query = serde_json::json!({"execute": "query-status"});
    let loaded = poll_until(PATIENCE, || new.qmp(&query)["status"] != "inmigrate");
    assert!(loaded, "QEMU does not load its state");
    new.qmp(&serde_json::json!({"execute": "cont"}));
    (new, result)
}

pub(crate) fn start(dir: tempfile::TempDir, more: &[&str]) -> Guest {
    let disk = dir.path().join("img0.erofs");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ])
    .args([
        "-M",
        "q35,hpet=on,vmport=off,smbus=off,sata=off",
        "-accel",
        "tcg",
    ])
    .args(["-cpu", "max", "-m", "256", "-smp", "1", "-append", CMDLINE])
    .arg("-kernel")
    .arg(guest_dir().join("vmlinuz"))
    .arg("-initrd")
    .arg(guest_dir().join("initramfs.cpio"))
    .args(["-serial", &format!("file:{}", path("console.log"))])
    .args(["-netdev", "user,id=net0", "-device"])
    .arg("virtio-net-pci,netdev=net0,mac=52:54:00:00:00:01")
    .arg("-blockdev")
    .arg(format!(
        "driver=raw,node-name=d0,read-only=on,file.driver=file,file.filename={}",
        disk.display()
    ))
    .args(["-device", "virtio-blk-pci,drive=d0,serial=img0"])
    .args([
        "-device",
        "virtio-rng-pci",
        "-device",
        "virtio-serial-pci",
        "-chardev",
    ])
    .arg(format!(
        "socket,id=agent,path={},server=on,wait=off",
        path("agent.sock")
    ))
    .args([
        "-device",
        "virtserialport,chardev=agent,name=migrator.agent",
    ])
    .arg("-qmp")
    .arg(format!("unix:{},server=on,wait=off", path("qmp.sock")))
    .args(more)
    .stdin(Stdio::null());
    let qemu = qemu.spawn().expect("QEMU starts");
    Guest {
        dir: Some(dir),
        qemu,
    }
}

pub(crate) fn container(name: &str, script: &str) -> Container {
    Container {
        name: name.into(),
        disk: "img0".into(),
        argv: vec!["sh".into(), "-c".into(), script.into()],
        env: vec![("GREETING".into(), "hello".into())],
        working_dir: "/srv/dir".into(),
        user: String::new(),
        memory_limit: Some(64 << 20),
        cpu_limit_milli: Some(1500),
    }
}

pub(crate) fn pod(containers: Vec<Container>) -> Configuration {
    Configuration {
        hostname: "web".into(),
        interfaces: vec![Interface {
            mac: [0x52, 0x54, 0, 0, 0, 1],
            addresses: ["10.0.2.15", "fd77::10"]
                .map(|a| (a.parse().expect("an address"), 24))
                .to_vec(),
            gateways: ["10.0.2.2", "fd77::1"]
                .map(|a| a.parse().expect("an address"))
                .to_vec(),
            neighbours: vec![("10.0.2.2".parse().expect("an address"), [0xee; 6])],
            mtu: Some(1430),
        }],
        dns: vec!["10.0.2.3".parse().expect("an address")],
        containers,
        storage: Vec::new(),
        sysctls: vec![("net.ipv4.tcp_fin_timeout".into(), "31".into())],
        settings: PodSettings::default(),
        container_settings: Vec::new(),
        output_offsets: Vec::new(),
    }
}

pub(crate) fn spec(container: &str, script: &str) -> ExecSpec {
    ExecSpec {
        container: container.into(),
        argv: vec!["sh".into(), "-c".into(), script.into()],
        env: vec![("EXTRA".into(), "more".into())],
        tty: None,
        stdin: false,
    }
}

pub(crate) async fn collect(mut exec: Exec) -> (String, String, i32) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let read = async {
        while let Some((stream, data)) = exec.output.next().await {
            match stream {
                Stream::Stdout => out.extend(data),
                Stream::Stderr => err.extend(data),
            }
        }
        exec.wait().await.expect("an exit code")
    };
    let code = timeout(PATIENCE, read).await.expect("the exec ends");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (text(out), text(err), code)
}

pub(crate) async fn read_until(exec: &mut Exec, wanted: &str) {
    let mut seen = String::new();
    while !seen.contains(wanted) {
        let next = timeout(PATIENCE, exec.output.next()).await;
        let next = next.unwrap_or_else(|_| panic!("no {wanted:?} in {seen:?}"));
        seen +=
            &String::from_utf8_lossy(&next.unwrap_or_else(|| panic!("the end after {seen:?}")).1);
    }
}

pub(crate) async fn run(client: &AgentClient, container: &str, script: &str) -> String {
    let exec = client.exec(spec(container, script)).await.expect("starts");
    let (out, err, code) = collect(exec).await;
    assert_eq!((err.as_str(), code), ("", 0), "{script}: {out}");
    out
}

pub(crate) async fn connect(guest: &Guest, store: &Arc<Store>) -> AgentClient {
    let limit = PATIENCE;
    AgentClient::connect(&guest.socket(), store.clone(), limit)
        .await
        .expect("the agent answers")
}
