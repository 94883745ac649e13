//! The guest agent in a real VM, driven by the host's client over virtio-serial.
//!
//! Needs: QEMU and mkfs.erofs; MIGRATOR_GUEST_DIR with `vmlinuz`, `initramfs.cpio` and a static
//! `busybox`. `cargo xtask test` provides them.

mod harness;
mod surroundings;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use vm_runtime::agent_client::{
    AgentClient, AgentError, ContainerState, Event, ExecSpec, FailureKind, OutputSink, Stream,
};

use harness::{
    PATIENCE, Store, boot, collect, connect, container, pod, read_until, relocate, run, spec,
};

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
        "hello from 1\n/srv/dir\nuid=101(web) gid=102(web) groups=7(extra),102(web)\n"
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
    guest.ended().await;
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
        "ip addr show; ip route; ip -6 route; ip neigh; cat /etc/hosts /etc/resolv.conf",
    )
    .await;
    for wanted in [
        "10.0.2.15/24",
        "fd77::10/24",
        "LOOPBACK,UP",
        "mtu 1430",
        "10.0.2.2 dev eth0 lladdr ee:ee:ee:ee:ee:ee",
        "default via 10.0.2.2",
        "default via fd77::1",
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
        "cgroup2 on /sys/fs/cgroup type cgroup2 (ro",
        "proc on /proc/sys type proc (ro",
        "overlay on / ",
        "ptmx",
        "urandom",
    ] {
        assert!(mounts.contains(wanted), "{wanted}: {mounts}");
    }
    assert!(!mounts.contains("erofs"), "{mounts}");
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
        let more = |bytes: &[u8]| bytes.len() >= length + 20_000 || bytes.ends_with(b"end\n");
        assert!(store.wait_until("chatty", more).await, "the output stopped");
        let text = store.text("chatty", Stream::Stdout);
        if text.ends_with("end\n") {
            let expected: String = (1..=LAST).map(|n| format!("{n}\n")).collect();
            assert!(text == expected + "end\n");
            println!("{round} connections");
            assert!(round > 20);
            return;
        }
        length = text.len();
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

#[tokio::test(flavor = "multi_thread")]
async fn output_survives_a_move_to_another_vmm() {
    const LAST: u32 = 200_000;
    let mut guest = boot();
    let store = Arc::new(Store::default());
    let mut client = connect(&guest, &store).await;
    let script = format!("seq 1 {LAST}; echo end; while :; do sleep 1; done");
    client
        .configure(pod(vec![container("chatty", &script)]))
        .await
        .expect("configures");
    client.start_pod().await.expect("starts");
    for round in 0..3 {
        // The second time the host does not even detach: whatever is under way is cut.
        if round != 1 {
            assert!(client.detach(PATIENCE).await);
        }
        let (moved, state) = relocate(guest, async || client.state().await.expect("a state")).await;
        guest = moved;
        let begun = Instant::now();
        let sink = store.clone();
        client = AgentClient::resume(&guest.socket(), sink, state, PATIENCE)
            .await
            .expect("resumes");
        client
            .set_clock(SystemTime::now())
            .await
            .expect("sets the clock");
        println!(
            "resumed in {} ms, {} bytes",
            begun.elapsed().as_millis(),
            store.last_offset("chatty", Stream::Stdout)
        );
        assert_eq!(run(&client, "chatty", "echo $GREETING").await, "hello\n");
    }
    store.wait_for("chatty", "end").await;
    let expected: String = (1..=LAST).map(|n| format!("{n}\n")).collect();
    assert!(store.text("chatty", Stream::Stdout) == expected + "end\n");
}
