//! The guest agent in a real VM, driven by the host's client over virtio-serial.
//!
//! Needs: QEMU and mkfs.erofs; MIGRATOR_GUEST_DIR with `vmlinuz`, `initramfs.cpio` and a static
//! `busybox`. `cargo xtask test` provides them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, sleep, timeout};
use vm_runtime::agent_client::{
    AgentClient, AgentError, Configuration, Container, ContainerState, Event, Exec, ExecSpec,
    FailureKind, Interface, OutputSink, Stream,
};
use vm_runtime::initramfs::CMDLINE;

/// A boot under TCG on a crowded machine, and anything that waits for one.
const PATIENCE: Duration = Duration::from_secs(60);

/// Keeps output in memory and refuses gaps.
#[derive(Default)]
struct Store(Mutex<BTreeMap<(String, Stream), Vec<u8>>>);

impl OutputSink for Store {
    fn append(&self, container: &str, stream: Stream, offset: u64, data: &[u8]) {
        let mut map = self.0.lock().expect("not poisoned");
        let bytes = map.entry((container.to_owned(), stream)).or_default();
        assert_eq!(
            offset,
            bytes.len() as u64,
            "a gap or a repetition in {container}"
        );
        bytes.extend_from_slice(data);
    }

    fn last_offset(&self, container: &str, stream: Stream) -> u64 {
        self.text(container, stream).len() as u64
    }
}

impl Store {
    fn text(&self, container: &str, stream: Stream) -> String {
        let map = self.0.lock().expect("not poisoned");
        let bytes = map.get(&(container.to_owned(), stream));
        String::from_utf8_lossy(bytes.map_or(&[], Vec::as_slice)).into_owned()
    }

    async fn wait_for(&self, container: &str, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.text(container, Stream::Stdout).contains(wanted) {
            assert!(Instant::now() < deadline, "no `{wanted}` from {container}");
            sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A VM that ends with the test.
struct Guest {
    dir: tempfile::TempDir,
    qemu: Child,
}

impl Guest {
    fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    fn console(&self) -> String {
        fs::read_to_string(self.dir.path().join("console.log")).unwrap_or_default()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the guest's console:\n{}", self.console());
        }
        self.qemu.kill().ok();
        self.qemu.wait().ok();
    }
}

fn guest_dir() -> PathBuf {
    std::env::var_os("MIGRATOR_GUEST_DIR")
        .expect("MIGRATOR_GUEST_DIR is not set: run this by `cargo xtask test`")
        .into()
}

fn image(dir: &Path) -> PathBuf {
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
    let out = dir.join("img0.erofs");
    let made = Command::new("mkfs.erofs")
        .arg(&out)
        .arg(&tree)
        .stdout(Stdio::null())
        .status()
        .expect("mkfs.erofs runs");
    assert!(made.success());
    out
}

fn boot() -> Guest {
    let dir = tempfile::tempdir().expect("a folder");
    let disk = image(dir.path());
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
    .stdin(Stdio::null());
    let qemu = qemu.spawn().expect("QEMU starts");
    Guest { dir, qemu }
}

fn container(name: &str, script: &str) -> Container {
    Container {
        name: name.into(),
        disk: "img0".into(),
        argv: vec!["sh".into(), "-c".into(), script.into()],
        env: vec![("GREETING".into(), "hello".into())],
        working_dir: "/work/dir".into(),
        user: String::new(),
        memory_limit: Some(64 << 20),
        cpu_limit_milli: Some(1500),
    }
}

fn pod(containers: Vec<Container>) -> Configuration {
    Configuration {
        hostname: "web".into(),
        interfaces: vec![Interface {
            mac: [0x52, 0x54, 0, 0, 0, 1],
            addresses: ["10.0.2.15", "fd77::10"]
                .map(|a| (a.parse().expect("an address"), 24))
                .to_vec(),
            gateways: vec!["10.0.2.2".parse().expect("an address")],
        }],
        dns: vec!["10.0.2.3".parse().expect("an address")],
        containers,
        sysctls: vec![("net.ipv4.tcp_fin_timeout".into(), "31".into())],
    }
}

fn spec(container: &str, script: &str) -> ExecSpec {
    ExecSpec {
        container: container.into(),
        argv: vec!["sh".into(), "-c".into(), script.into()],
        env: vec![("EXTRA".into(), "more".into())],
        tty: None,
        stdin: false,
    }
}

async fn collect(mut exec: Exec) -> (String, String, i32) {
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

async fn read_until(exec: &mut Exec, wanted: &str) {
    let mut seen = String::new();
    while !seen.contains(wanted) {
        let next = timeout(PATIENCE, exec.output.next()).await;
        let next = next.unwrap_or_else(|_| panic!("no {wanted:?} in {seen:?}"));
        seen +=
            &String::from_utf8_lossy(&next.unwrap_or_else(|| panic!("the end after {seen:?}")).1);
    }
}

async fn run(client: &AgentClient, container: &str, script: &str) -> String {
    let exec = client.exec(spec(container, script)).await.expect("starts");
    let (out, err, code) = collect(exec).await;
    assert_eq!((err.as_str(), code), ("", 0), "{script}: {out}");
    out
}

async fn connect(guest: &Guest, store: &Arc<Store>) -> AgentClient {
    let limit = PATIENCE;
    AgentClient::connect(&guest.socket(), store.clone(), limit)
        .await
        .expect("the agent answers")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_runs_a_pod_from_boot_to_stop() {
    let begun = Instant::now();
    let guest = boot();
    let store = Arc::new(Store::default());
    let client = connect(&guest, &store).await;
    println!(
        "attached {} ms after QEMU's start",
        begun.elapsed().as_millis()
    );
    let mut events = client.events();

    let early = client.start_pod().await.expect_err("not configured");
    assert!(matches!(early, AgentError::Refused(f) if f.kind == FailureKind::State));
    let mut web = container(
        "web",
        "trap 'echo bye; exit 3' TERM; echo $GREETING from $$; pwd; id; while :; do sleep 0.1; done",
    );
    web.user = "web".into();
    let stubborn = container(
        "stubborn",
        "trap '' TERM; echo up; while :; do sleep 1; done",
    );
    client
        .configure(pod(vec![web.clone(), stubborn.clone()]))
        .await
        .expect("configures");
    client
        .configure(pod(vec![web, stubborn]))
        .await
        .expect("the same again is no error");
    assert!(client.configure(pod(vec![])).await.is_err());
    let begun = Instant::now();
    client.start_pod().await.expect("starts");
    println!("started in {} ms", begun.elapsed().as_millis());
    client.start_pod().await.expect("again is no error");
    store.wait_for("web", "extra").await;
    assert_eq!(
        store.text("web", Stream::Stdout),
        "hello from 1\n/work/dir\nuid=101(web) gid=102(web) groups=7(extra),102(web)\n"
    );
    store.wait_for("stubborn", "up").await;

    in_a_container(&client).await;
    streams_and_codes(&client).await;
    on_a_terminal(&client).await;

    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000);
    client.set_clock(then).await.expect("sets the clock");
    let stats = client.stats().await.expect("figures");
    assert!(
        stats.clock_unix_ns / 1_000_000_000 - 2_000_000_000 < 60,
        "{stats:?}"
    );
    assert!(
        stats.memory_total > 200 << 20 && stats.memory_available > 100 << 20,
        "{stats:?}"
    );
    assert_eq!(stats.containers.len(), 2);
    println!("{stats:?}");

    let begun = Instant::now();
    client
        .stop_pod(Duration::from_secs(2))
        .await
        .expect("stops");
    assert!(
        begun.elapsed() > Duration::from_secs(2),
        "the stubborn one has its grace"
    );
    let status = client.status().await.expect("a status");
    let states: Vec<ContainerState> = status.containers.iter().map(|c| c.state).collect();
    let exited = |code| ContainerState::Exited { code };
    assert_eq!(states, [exited(3), exited(128 + 9)]);
    assert!(store.text("web", Stream::Stdout).ends_with("bye\n"));
    let mut told = Vec::new();
    while let Ok(event) = events.try_recv() {
        told.push(event);
    }
    println!("{told:?}");
    assert!(told.contains(&Event::Stopped));
    assert!(told.contains(&Event::ContainerExited {
        container: "web".into(),
        code: 3
    }));

    client.power_off().expect("asks");
    let mut guest = guest;
    let deadline = Instant::now() + PATIENCE;
    while guest.qemu.try_wait().expect("its own child").is_none() {
        assert!(Instant::now() < deadline, "the VM did not power off");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn in_a_container(client: &AgentClient) {
    let processes = run(client, "web", "ps -o pid,args").await;
    assert!(processes.contains("1 sh -c trap"), "{processes}");
    assert!(!processes.contains("init"), "{processes}");
    assert_eq!(
        run(client, "web", "hostname; echo $EXTRA $HOSTNAME $HOME").await,
        "web\nmore web /srv\n"
    );
    let addresses = run(
        client,
        "stubborn",
        "ip addr show; ip route; cat /etc/hosts /etc/resolv.conf",
    )
    .await;
    for wanted in [
        "10.0.2.15/24",
        "fd77::10/24",
        "LOOPBACK,UP",
        "default via 10.0.2.2",
        "fd77::10\tweb",
        "nameserver 10.0.2.3",
    ] {
        assert!(addresses.contains(wanted), "{wanted}: {addresses}");
    }
    assert!(!addresses.contains("tentative"), "{addresses}");
    let mounts = run(
        client,
        "stubborn",
        "mount; ls /dev /dev/pts; echo x > /new && cat /new",
    )
    .await;
    for wanted in [
        "sysfs on /sys type sysfs (ro",
        "proc on /proc/sys type proc (ro",
        "overlay on / ",
        "ptmx",
        "urandom",
    ] {
        assert!(mounts.contains(wanted), "{wanted}: {mounts}");
    }
    assert!(
        !mounts.contains("erofs") && !mounts.contains("cgroup"),
        "{mounts}"
    );
    let sysctls = run(client, "stubborn", "cat /proc/sys/net/core/rmem_max /proc/sys/net/core/rmem_default /proc/sys/net/ipv4/tcp_fin_timeout; grep CapEff /proc/self/status").await;
    assert_eq!(
        sysctls,
        "16777216\n4194304\n31\nCapEff:\t00000000a00425fb\n"
    );
    // What one writes the other does not see.
    assert_eq!(
        run(client, "web", "ls / | grep -c new || true").await,
        "0\n"
    );
}

async fn streams_and_codes(client: &AgentClient) {
    let exec = client
        .exec(spec("web", "echo out; echo err >&2; exit 7"))
        .await
        .expect("starts");
    assert_eq!(collect(exec).await, ("out\n".into(), "err\n".into(), 7));
    let exec = client
        .exec(spec("web", "kill -9 $$"))
        .await
        .expect("starts");
    assert_eq!(collect(exec).await.2, 128 + 9);
    let missing = ExecSpec {
        argv: vec!["nothing".into()],
        ..spec("web", "")
    };
    let error = client.exec(missing).await.expect_err("no such program");
    assert!(
        matches!(&error, AgentError::Refused(f) if f.kind == FailureKind::NotExecutable),
        "{error}"
    );
    let error = client
        .exec(spec("nobody", ""))
        .await
        .expect_err("no such container");
    assert!(
        matches!(&error, AgentError::Refused(f) if f.kind == FailureKind::NoContainer),
        "{error}"
    );

    // More than any window, both ways.
    let through = ExecSpec {
        stdin: true,
        ..spec("stubborn", "cat")
    };
    let mut exec = client.exec(through).await.expect("starts");
    let input = exec.input.take().expect("asked for");
    let sent: String = (0..100_000).map(|n| format!("{n}\n")).collect();
    let bytes = sent.clone();
    let writer = tokio::spawn(async move {
        input.write(bytes.as_bytes()).await.expect("written");
        input.close().expect("closed");
    });
    let (out, _, code) = collect(exec).await;
    writer.await.expect("writes all");
    assert_eq!(code, 0);
    assert!(
        out == sent,
        "{} of {} bytes came back",
        out.len(),
        sent.len()
    );
}

async fn on_a_terminal(client: &AgentClient) {
    let terminal = ExecSpec {
        tty: Some((33, 77)),
        ..spec(
            "web",
            "stty size; read x; echo got $x; stty size; ls -l /dev/pts; exit 5",
        )
    };
    let mut exec = client.exec(terminal).await.expect("starts");
    read_until(&mut exec, "33 77\r\n").await;
    exec.control.resize(40, 100).expect("resizes");
    let input = exec.input.take().expect("a terminal has one");
    input.write(b"word\r").await.expect("written");
    let (out, _, code) = collect(exec).await;
    assert!(out.contains("got word\r\n40 100\r\n"), "{out}");
    assert_eq!(code, 5);
    let interactive = ExecSpec {
        argv: vec!["sh".into()],
        tty: Some((24, 80)),
        ..spec("web", "")
    };
    let mut exec = client.exec(interactive).await.expect("starts");
    let input = exec.input.take().expect("a terminal has one");
    read_until(&mut exec, "$ ").await;
    input.write(b"cat /etc/group -\r").await.expect("written");
    read_until(&mut exec, "extra:x:7:web\r\n").await;
    input.write(b"\x03").await.expect("written");
    read_until(&mut exec, "$ ").await;
    input.write(b"exit 4\r").await.expect("written");
    let (_, _, code) = collect(exec).await;
    assert_eq!(code, 4, "^C ends the program, not the shell");
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_neither_lost_nor_doubled_when_connections_break() {
    const LAST: u32 = 400_000;
    let guest = boot();
    let store = Arc::new(Store::default());
    let mut client = connect(&guest, &store).await;
    let script = format!("seq 1 {LAST}; echo end; while :; do sleep 1; done");
    client
        .configure(pod(vec![container("chatty", &script)]))
        .await
        .expect("configures");
    client.start_pod().await.expect("starts");
    let mut length = 0;
    for round in 0.. {
        let deadline = Instant::now() + PATIENCE;
        while store.last_offset("chatty", Stream::Stdout) < length + 20_000 {
            if store.text("chatty", Stream::Stdout).ends_with("end\n") {
                let expected: String = (1..=LAST).map(|n| format!("{n}\n")).collect();
                assert!(store.text("chatty", Stream::Stdout) == expected + "end\n");
                println!("{round} connections");
                assert!(round > 20);
                return;
            }
            assert!(Instant::now() < deadline, "the output stopped");
            sleep(Duration::from_millis(1)).await;
        }
        length = store.last_offset("chatty", Stream::Stdout);
        client = match round % 3 {
            // The connection breaks.
            0 => {
                client.reconnect().expect("reconnects");
                client
            }
            // The service is killed: the session is forgotten.
            1 => {
                drop(client);
                connect(&guest, &store).await
            }
            // The pod moves: the session moves with it.
            _ => {
                assert!(client.detach(PATIENCE).await);
                assert!(matches!(client.stats().await, Err(AgentError::Detached)));
                let state = client.state().await.expect("a state");
                drop(client);
                let sink = store.clone();
                AgentClient::resume(&guest.socket(), sink, state, PATIENCE)
                    .await
                    .expect("resumes")
            }
        };
        assert!(client.status().await.expect("a status").started);
    }
}
