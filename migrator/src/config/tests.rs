use super::*;

const FULL: &str = r#"
name: a
state_dir: state
bridge: br0
uplink: eth0
xdp: off
listen: 10.78.0.1:7077
advertise: 10.78.0.1:7078
peers: { b: "10.78.0.2:7077" }
tls: { ca: ca.pem, cert: /etc/a.pem, key: a.key }
api_socket: /run/a.sock
guest: { kernel: vmlinuz, initramfs: guest.img }
qemu: { binary: qemu-system-x86_64, lib_dir: lib, data_dirs: [share], accel: tcg }
tunnel: { kind: vxlan, vni: 77 }
limits: { pods: 3, park_bytes_per_pod: 65536 }
migration: { connections: 4, compress: zstd, on_overflow: drop }
templates: manual
registries:
  mirrors: { docker.io: ["https://mirror.example:8443/hub"], "reg.example:5000": ["http://10.0.0.1:5000"] }
  auth_file: auth.json
  ca: /etc/registry-ca.pem
  plain_http: ["localhost:5000"]
  keep_layers: true
"#;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("node.yaml"), Path::new("/etc/migrator"))
}

/// The whole chain, as the command line prints it.
fn message(text: &str) -> String {
    let error = parse(text).expect_err("this file must be refused");
    let mut out = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        out = format!("{out}: {cause}");
        source = cause.source();
    }
    out
}

#[test]
fn a_full_file_is_read_and_relative_paths_start_at_its_folder() {
    let config = parse(FULL).unwrap();
    assert_eq!(config.state_dir, Path::new("/etc/migrator/state"));
    assert_eq!(config.tls.cert, Path::new("/etc/a.pem"));
    assert_eq!(config.guest.kernel, Path::new("/etc/migrator/vmlinuz"));
    assert_eq!(config.qemu.data_dirs, [Path::new("/etc/migrator/share")]);
    assert_eq!(
        config.qemu.binary.as_deref(),
        Some(Path::new("qemu-system-x86_64"))
    );
    assert_eq!(config.api_socket(), Path::new("/run/a.sock"));
    assert_eq!(config.advertised().port(), 7078);
    assert_eq!(config.limits.log_bytes, Limits::default().log_bytes);
    assert_eq!(config.templates, TemplateMode::Manual);
    let tunnel = Tunnel::Vxlan {
        vni: 77,
        port: 4789,
        mtu: None,
    };
    assert_eq!(config.tunnel, tunnel);
    assert_eq!(config.park_limits().bytes_per_pod, 65536);
    assert_eq!(config.park_limits().bytes, Limits::default().park_bytes);
    assert_eq!(config.migration.on_overflow, OnOverflow::Drop);
    assert_eq!(config.migration.connections, 4);
    let registries = &config.registries;
    assert_eq!(
        registries.auth_file.as_deref(),
        Some(Path::new("/etc/migrator/auth.json"))
    );
    assert_eq!(
        registries.ca.as_deref(),
        Some(Path::new("/etc/registry-ca.pem"))
    );
    assert!(registries.keep_layers && registries.mirrors.len() == 2);
    assert_eq!(config.migration.compress, Compress::Zstd);
    assert_eq!(config.xdp, XdpChoice::Off);
}

#[test]
fn optional_keys_have_defaults() {
    let config = parse(
        "{name: a, state_dir: /s, bridge: br0, uplink: eth0, listen: '[::1]:1', \
         tls: {ca: a, cert: b, key: c}, guest: {kernel: k, initramfs: i}}",
    )
    .unwrap();
    assert_eq!(config.tunnel, Tunnel::Off);
    assert_eq!(config.xdp, XdpChoice::Auto);
    assert_eq!(config.api_socket(), Path::new("/s/api.sock"));
    assert_eq!(config.qemu, QemuConfig::default());
    assert!(config.peers.is_empty());
}

#[test]
fn an_unknown_key_is_named_with_its_section_and_the_file() {
    let text = message(&FULL.replace("cert:", "certificate:"));
    for part in ["node.yaml", "tls", "certificate"] {
        assert!(text.contains(part), "{text}");
    }
    let text = message(&FULL.replace("uplink:", "uplnk:"));
    assert!(text.contains("uplnk"), "{text}");
}

#[test]
fn values_that_cannot_work_are_refused_by_key() {
    for (from, to, key) in [
        ("b: \"10", "a: \"10", "peers"),
        ("uplink: eth0", "uplink: br0", "uplink"),
        ("name: a", "name: A_b", "A_b"),
        ("bridge: br0", "bridge: a/b", "a/b"),
        ("pods: 3", "pods: 0", "limits.pods"),
        ("connections: 4", "connections: 65", "migration.connections"),
        ("connections: 4", "connections: 0", "migration.connections"),
        ("compress: zstd", "compress: gzip", "gzip"),
        ("10.78.0.1:7078", "10.78.0.1:0", "listen"),
    ] {
        assert!(FULL.contains(from), "{from}");
        let text = message(&FULL.replacen(from, to, 1));
        assert!(text.contains(key), "{key}: {text}");
    }
}

#[test]
fn a_state_folder_too_deep_for_its_sockets_is_refused() {
    let deep = format!("state_dir: /{}", "d".repeat(80));
    let text = message(&FULL.replace("state_dir: state", &deep));
    assert!(
        text.contains("state_dir") && text.contains("too long"),
        "{text}"
    );
}

#[test]
fn a_tunnel_is_off_or_has_a_number_and_a_port_that_exist() {
    let with = |tunnel: &str| FULL.replace("{ kind: vxlan, vni: 77 }", tunnel);
    for off in ["off", "false"] {
        assert_eq!(parse(&with(off)).unwrap().tunnel, Tunnel::Off);
    }
    for (tunnel, says) in [
        ("on", "`off`, or a section"),
        ("true", "`off`, or a section"),
        ("{ kind: geneve, vni: 1 }", "vxlan"),
        ("{ kind: vxlan }", "vni"),
        (
            "{ kind: vxlan, vni: 0 }",
            "`tunnel.vni` must be between 1 and 16777215",
        ),
        ("{ kind: vxlan, vni: 16777216 }", "`tunnel.vni`"),
        ("{ kind: vxlan, vni: 1, port: 0 }", "`tunnel.port`"),
        ("{ kind: vxlan, vni: 1, mtu: 9 }", "`tunnel.mtu`"),
        ("{ kind: vxlan, vni: 1, size: 9 }", "size"),
    ] {
        let text = message(&with(tunnel));
        assert!(text.contains(says), "{tunnel}: {text}");
    }
}

/// The full file with a routed topology in place of its bridge.
fn routed(pods: &str) -> String {
    let topology = format!("topology: {{ kind: routed, pods: [{pods}] }}");
    FULL.replace("bridge: br0", &topology)
}

#[test]
fn pods_are_routed_if_the_topology_says_so_and_on_a_bridge_otherwise() {
    let config = parse(FULL).unwrap();
    assert_eq!(config.topology, Topology::Bridge);
    assert_eq!(config.ground(), Ground::Bridge("br0".to_owned()));
    let said = parse(&FULL.replace("bridge: br0", "bridge: br0\ntopology: bridge"));
    assert_eq!(said.unwrap().topology, Topology::Bridge);
    let config = parse(&routed("10.77.0.0/24, \"fd77::/64\"")).unwrap();
    let Ground::Routed(pods) = config.ground() else {
        panic!("{config:?}");
    };
    assert_eq!(pods.to_string(), "10.77.0.0/24, fd77::/64");
    assert_eq!(config.topology, Topology::Routed { pods });
}

#[test]
fn each_topology_has_the_keys_that_it_needs_and_no_others() {
    for (text, says) in [
        (FULL.replace("bridge: br0", ""), "`bridge` is missing"),
        (
            routed("10.77.0.0/24").replace("uplink:", "bridge: br0\nuplink:"),
            "`bridge` is `br0`, and in the routed topology",
        ),
        (
            routed("10.77.0.0/24").replace("{ kind: vxlan, vni: 77 }", "off"),
            "`tunnel` is off",
        ),
        (
            FULL.replace("bridge: br0", "topology: flat"),
            "`bridge`, or a section",
        ),
        (
            FULL.replace("bridge: br0", "topology: { kind: bridge, pods: [] }"),
            "routed",
        ),
        (
            FULL.replace("bridge: br0", "topology: { kind: routed }"),
            "pods",
        ),
    ] {
        let text = message(&text);
        assert!(text.contains(says), "{says}: {text}");
    }
}

#[test]
fn networks_of_pods_are_checked_against_each_other_and_against_the_nodes() {
    for (pods, says) in [
        ("", "`pods` needs at least one network"),
        ("10.77.0.1/24", "write 10.77.0.0/24"),
        ("10.77.0.0/24, 10.77.0.64/26", "overlap"),
        ("fe80::/64", "no host's"),
        ("ten", "is not a network"),
        ("10.0.0.0/8", "own address 10.78.0.1"),
        ("10.78.0.2/32", "node b is at 10.78.0.2"),
    ] {
        let text = message(&routed(pods));
        assert!(text.contains(says), "{says}: {text}");
    }
}

#[test]
fn bound_flows_live_for_an_hour_unless_it_is_said_otherwise() {
    let with = |key: &str| format!("{FULL}forwarding: {{ {key} }}\n");
    let limit = |config: Config| config.forwarding.bound_limit().as_secs();
    assert_eq!(limit(parse(FULL).unwrap()), 3600);
    assert_eq!(limit(parse(&with("bound_limit_s: 60")).unwrap()), 60);
    for (key, says) in [
        (
            "bound_limit_s: 0",
            "`forwarding.bound_limit_s` must be between 1",
        ),
        ("bound_limit_s: 31536001", "`forwarding.bound_limit_s`"),
        ("bound_limit_s: 1h", "bound_limit_s"),
        ("bound: 1", "bound"),
    ] {
        let text = message(&with(key));
        assert!(text.contains(says), "{key}: {text}");
    }
}
