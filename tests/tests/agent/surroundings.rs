//! What containers expect of their surroundings, each asked from inside: one guest with a container for each thing.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use vm_runtime::agent_client::{
    AgentClient, Check, Condition, Configuration, ContainerSettings, ContainerState, HostAlias,
    MemoryMount, MemoryVolume, PodSettings, Probe, Reason, Resolver, Restart, Stream,
};

use crate::harness::{PATIENCE, Store, boot, connect, container, pod, run};

/// Runs until it is asked to end.
const WAITS: &str = "trap 'echo asked; exit 0' TERM; echo up; while :; do sleep 0.1; done";

fn probe(check: Check, failures: u32) -> Option<Probe> {
    Some(Probe {
        check,
        initial_delay_s: 0,
        period_s: 1,
        timeout_s: 5,
        successes: 1,
        failures,
    })
}

fn strict() -> ContainerSettings {
    ContainerSettings {
        groups: vec![7, 2000],
        non_root: true,
        add_capabilities: 1 << 10,
        drop_capabilities: u64::MAX >> 23,
        no_new_privileges: true,
        read_only_root: true,
        memory_mounts: ["/scratch", "/link"]
            .map(|path| MemoryMount {
                volume: "scratch".into(),
                path: path.into(),
                read_only: false,
            })
            .to_vec(),
        ..ContainerSettings::default()
    }
}

fn wanted() -> Configuration {
    let exec = |words: &[&str]| Check::Exec(words.iter().map(|w| (*w).to_owned()).collect());
    let settings = ContainerSettings::default;
    let parts = [
        ("plain", WAITS, settings()),
        ("strict", WAITS, strict()),
        (
            "terminal",
            "stty size; test -t 0 && test -t 1 && test -t 2 && echo $TERM; read x",
            ContainerSettings {
                tty: true,
                stdin: true,
                ..settings()
            },
        ),
        (
            "crash",
            "ls /left 2>&1; echo x > /left; exit 3",
            ContainerSettings {
                restart: Restart::Always,
                ..settings()
            },
        ),
        ("hog", "tail /dev/zero", settings()),
        (
            "sick",
            WAITS,
            ContainerSettings {
                restart: Restart::OnFailure,
                liveness: probe(exec(&["false"]), 2),
                ..settings()
            },
        ),
        (
            "web",
            "while ! test -e /go; do sleep 0.1; done; while :; do nc -l -p 8080; done",
            ContainerSettings {
                readiness: probe(
                    Check::Tcp {
                        host: None,
                        port: 8080,
                    },
                    1,
                ),
                ..settings()
            },
        ),
        (
            "polite",
            "trap 'echo quit; exit 5' QUIT; trap 'echo term' TERM; echo up; while :; do sleep 0.1; done",
            ContainerSettings {
                stop_signal: Some(3),
                pre_stop: Some(
                    ["sh", "-c", "echo first > /proc/1/fd/1"]
                        .map(str::to_owned)
                        .to_vec(),
                ),
                ..settings()
            },
        ),
    ];
    let mut containers = Vec::new();
    let mut container_settings = Vec::new();
    for (name, script, settings) in parts {
        let mut one = container(name, script);
        match name {
            "strict" => one.user = "1000:1000".into(),
            "hog" => one.memory_limit = Some(16 << 20),
            _ => {}
        }
        containers.push(one);
        container_settings.push(settings);
    }
    Configuration {
        settings: PodSettings {
            hosts: vec![HostAlias {
                ip: "10.1.2.3".parse().expect("an address"),
                names: vec!["db".into(), "db.local".into()],
            }],
            resolver: Some(Resolver {
                servers: vec!["10.0.2.3".parse().expect("an address")],
                searches: vec!["a.local".into()],
                options: vec!["ndots:5".into()],
            }),
            fs_group: Some(3000),
            memory_volumes: vec![MemoryVolume {
                name: "scratch".into(),
                size: Some(1 << 20),
            }],
            ..PodSettings::default()
        },
        container_settings,
        ..pod(containers)
    }
}

/// Waits until a container fares as wanted.
async fn fares(client: &AgentClient, name: &str, wanted: impl Fn(&Condition) -> bool) -> Condition {
    let mut events = client.events();
    let wait = async {
        loop {
            let all = client.conditions().await.expect("conditions");
            let one = all.into_iter().find(|c| c.container == name);
            let one = one.expect("a condition of each container");
            if wanted(&one) {
                return one;
            }
            // Whatever it is: they are asked again. Some may have been missed.
            events.recv().await.ok();
        }
    };
    let found = timeout(PATIENCE, wait).await;
    found.unwrap_or_else(|_| panic!("{name} does not come to fare as wanted"))
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_find_what_their_pod_says() {
    let guest = boot();
    let store = Arc::new(Store::default());
    let client = connect(&guest, &store).await;
    client.configure(wanted()).await.expect("configures");
    client.start_pod().await.expect("starts");

    as_every_runtime_has_it(&client).await;
    with_few_rights(&client).await;
    store.wait_for("terminal", "24 80\r\nxterm\r\n").await;

    let crash = fares(&client, "crash", |c| c.restarts > 0 && c.waits_ms.is_some()).await;
    assert_eq!(
        (crash.reason, crash.last_code),
        (Some(Reason::Error), Some(3))
    );
    assert!(!crash.ready && crash.waits_ms <= Some(10_000), "{crash:?}");
    // The first restart comes at once, and finds the image as it was.
    assert_eq!(
        store.text("crash", Stream::Stdout),
        "ls: /left: No such file or directory\n".repeat(2)
    );
    let hog = fares(&client, "hog", |c| c.reason.is_some()).await;
    assert_eq!(
        (hog.reason, hog.last_code),
        (Some(Reason::OomKilled), Some(137))
    );
    let sick = fares(&client, "sick", |c| c.restarts > 0).await;
    assert_eq!(
        (sick.reason, sick.last_code),
        (Some(Reason::Unhealthy), Some(0))
    );
    store.wait_for("sick", "asked\nup\n").await;
    let web = fares(&client, "web", |_| true).await;
    assert!(!web.ready, "{web:?}");
    run(&client, "web", "echo > /go").await;
    fares(&client, "web", |c| c.ready).await;

    client
        .stop_pod(Duration::from_secs(5))
        .await
        .expect("stops");
    let polite = store.text("polite", Stream::Stdout);
    assert_eq!(polite, "up\nfirst\nquit\n");
    let status = client.status().await.expect("a status");
    for one in &status.containers {
        assert!(
            matches!(one.state, ContainerState::Exited { .. }),
            "{one:?}"
        );
    }
}

async fn as_every_runtime_has_it(client: &AgentClient) {
    let files = run(
        client,
        "plain",
        "cat /etc/hosts /etc/resolv.conf /etc/hostname",
    )
    .await;
    for wanted in [
        "10.0.2.15\tweb\n",
        "10.1.2.3\tdb db.local\n",
        "nameserver 10.0.2.3\nsearch a.local\noptions ndots:5\nweb\n",
    ] {
        assert!(files.contains(wanted), "{wanted:?}: {files}");
    }
    let limits = "cd /sys/fs/cgroup && cat memory.max cpu.max pids.max memory.oom.group";
    assert_eq!(
        run(client, "plain", limits).await,
        "67108864\n150000 100000\n16384\n1\n"
    );
    let devices = run(client, "plain", "ls /dev").await;
    let devices: Vec<&str> = devices.split_whitespace().collect();
    assert_eq!(
        devices,
        [
            "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin",
            "stdout", "tty", "urandom", "zero"
        ]
    );
    // What is hidden, and what is only to be read.
    let hidden = "ls /sys/firmware | wc -l; head -c 1 /proc/kcore | wc -c; echo 1 > /proc/sys/vm/swappiness || echo no";
    let exec = client.exec(crate::harness::spec("plain", hidden)).await;
    let (out, err, _) = crate::harness::collect(exec.expect("starts")).await;
    assert_eq!(out, "0\n0\nno\n", "{err}");
    assert!(err.contains("Read-only file system"), "{err}");
    let mounts = run(client, "plain", "mount").await;
    for wanted in [
        "cgroup2 on /sys/fs/cgroup type cgroup2 (ro",
        "mqueue on /dev/mqueue",
        "shm on /dev/shm type tmpfs (rw,nosuid,nodev,noexec,relatime,size=65536k",
    ] {
        assert!(mounts.contains(wanted), "{wanted}: {mounts}");
    }
    // Each container has them for itself.
    let writes = "ls -l /dev/null | awk '{print $1}'; echo x > /dev/mine; echo x > /dev/shm/mine; ls /dev/mine /dev/shm/mine";
    assert_eq!(
        run(client, "plain", writes).await,
        "crw-rw-rw-\n/dev/mine\n/dev/shm/mine\n"
    );
    let other = "ls -d /dev/mine /dev/shm/* 2>&1 | grep -c 'No such file'";
    assert_eq!(run(client, "polite", other).await, "2\n");
}

async fn with_few_rights(client: &AgentClient) {
    let rights = "id; grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status; ls -ldn /scratch | awk '{print $1, $4}'";
    assert_eq!(
        run(client, "strict", rights).await,
        "uid=1000 gid=1000 groups=7(extra),1000,2000,3000\n\
         CapEff:\t0000000000000000\nCapBnd:\t0000000000000400\nNoNewPrivs:\t1\n\
         drwxrwsrwx 3000\n"
    );
    let writes = "echo x > /new; echo x > /scratch/small && cat /scratch/small; head -c 2000000 /dev/zero > /scratch/large || echo full";
    let exec = client.exec(crate::harness::spec("strict", writes)).await;
    let (out, err, _) = crate::harness::collect(exec.expect("starts")).await;
    assert_eq!(out, "x\nfull\n", "{err}");
    assert!(err.contains("/new: Read-only file system"), "{err}");
    let behind = "cat /link/small /behind/small";
    assert_eq!(run(client, "strict", behind).await, "x\nx\n");
}
