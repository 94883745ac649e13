//! Surroundings of containers, as a pod file names them.

use guest_agent::protocol::settings::{
    Check, DEFAULT_CAPABILITIES, MemoryMount, MemoryVolume, Restart,
};

use super::*;

/// A pod with these fields in its `spec`, and in its container.
fn read(spec: &str, container: &str) -> Result<PodSpec, PodError> {
    PodSpec::from_yaml(&format!(
        "{{metadata: {{name: p, annotations: {{migrator/ipv4: 10.77.0.9/24}}}}, spec: {{{spec} containers: [{{name: c, image: i, {container}}}]}}}}"
    ))
}

fn container(spec: &str, fields: &str) -> ContainerSpec {
    let mut pod = read(spec, fields).unwrap();
    // What travels, and is kept, is the same.
    let text = serde_json::to_string(&pod).unwrap();
    assert_eq!(serde_json::from_str::<PodSpec>(&text).unwrap(), pod);
    pod.containers.remove(0)
}

#[test]
fn containers_are_started_again_unless_the_pod_says_otherwise() {
    let restart = |spec: &str| container(spec, "").settings.restart;
    assert_eq!(restart(""), Restart::Always);
    assert_eq!(restart("restartPolicy: OnFailure,"), Restart::OnFailure);
    assert_eq!(restart("restartPolicy: Never,"), Restart::Never);
    // A pod of an earlier build's, which knew no other policy.
    let text = serde_json::to_string(&read("restartPolicy: Never,", "").unwrap()).unwrap();
    assert!(!text.contains("settings"), "{text}");
}

#[test]
fn a_containers_security_context_comes_before_its_pods() {
    let pod = "securityContext: {runAsUser: 1000, runAsGroup: 2000, runAsNonRoot: true, supplementalGroups: [5, 6], fsGroup: 7},";
    let one = container(pod, "");
    assert_eq!(one.user.as_deref(), Some("1000:2000"));
    assert!(one.settings.non_root && one.settings.groups == [5, 6]);
    assert_eq!(read(pod, "").unwrap().settings.fs_group, Some(7));
    let one = container(pod, "securityContext: {runAsUser: 0, runAsNonRoot: false}");
    assert_eq!(one.user.as_deref(), Some("0:2000"));
    assert!(!one.settings.non_root);
    assert_eq!(container("", "").user, None);
    let rights = "securityContext: {readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, privileged: false, \
                  capabilities: {drop: [ALL], add: [NET_BIND_SERVICE, CAP_SYS_TIME]}}";
    let settings = container("", rights).settings;
    assert!(settings.read_only_root && settings.no_new_privileges);
    assert_eq!(settings.capabilities(), 1 << 10 | 1 << 25);
    assert_eq!(
        container("", "").settings.capabilities(),
        DEFAULT_CAPABILITIES
    );
    assert!(!container("", "").settings.no_new_privileges);
}

#[test]
fn probes_have_kubernetes_defaults_and_name_ports() {
    let fields = "ports: [{name: web, containerPort: 8080}], \
        livenessProbe: {httpGet: {path: /ok, port: web, httpHeaders: [{name: X-A, value: b}]}}, \
        readinessProbe: {tcpSocket: {port: 9, host: 10.0.0.1}, successThreshold: 2, periodSeconds: 3}, \
        startupProbe: {exec: {command: [a, b]}, failureThreshold: 30}, \
        lifecycle: {preStop: {exec: {command: [bye]}}}, tty: true, stdin: true";
    let settings = container("", fields).settings;
    let liveness = settings.liveness.unwrap();
    assert_eq!(
        liveness.check,
        Check::Http {
            host: None,
            port: 8080,
            path: "/ok".to_owned(),
            headers: vec![("X-A".to_owned(), "b".to_owned())],
        }
    );
    let numbers = (liveness.period_s, liveness.timeout_s, liveness.failures);
    assert_eq!(numbers, (10, 1, 3));
    let readiness = settings.readiness.unwrap();
    assert_eq!((readiness.successes, readiness.period_s), (2, 3));
    assert_eq!(settings.startup.unwrap().failures, 30);
    assert_eq!(settings.pre_stop.unwrap(), ["bye"]);
    assert!(settings.tty && settings.stdin);
}

#[test]
fn names_hosts_and_name_servers_are_the_pods() {
    let spec = "hostname: db-0, terminationGracePeriodSeconds: 45, hostAliases: [{ip: 10.0.0.1, hostnames: [a, b.c]}], \
        dnsPolicy: None, dnsConfig: {nameservers: [10.0.0.2], searches: [x.y], options: [{name: ndots, value: \"5\"}, {name: edns0}]},";
    let settings = read(spec, "").unwrap().settings;
    assert_eq!(settings.hostname.as_deref(), Some("db-0"));
    assert_eq!(settings.grace_s, Some(45));
    assert_eq!(settings.hosts[0].names, ["a", "b.c"]);
    let resolver = settings.resolver.unwrap();
    assert_eq!(resolver.options, ["ndots:5", "edns0"]);
    assert_eq!(
        (resolver.servers.len(), &resolver.searches[..]),
        (1, &["x.y".to_owned()][..])
    );
}

#[test]
fn a_volume_in_memory_is_no_disk() {
    let spec = "volumes: [{name: m, emptyDir: {medium: Memory, sizeLimit: 1Mi}}, {name: d, emptyDir: {sizeLimit: 64Mi}}],";
    let mounts =
        "volumeMounts: [{name: m, mountPath: /m, readOnly: true}, {name: d, mountPath: /d}]";
    let pod = read(spec, mounts).unwrap();
    assert_eq!((pod.volumes.len(), pod.volumes[0].name.as_str()), (1, "d"));
    let volume = MemoryVolume {
        name: "m".to_owned(),
        size: Some(1 << 20),
    };
    assert_eq!(pod.settings.memory_volumes, [volume]);
    let one = &pod.containers[0];
    assert_eq!(one.volume_mounts[0].volume, "d");
    let mount = MemoryMount {
        volume: "m".to_owned(),
        path: "/m".to_owned(),
        read_only: true,
    };
    assert_eq!(one.settings.memory_mounts, [mount]);
}

#[test]
fn what_cannot_be_kept_is_refused_by_its_path() {
    for (spec, fields, wanted) in [
        (
            "",
            "securityContext: {privileged: true}",
            "containers[0].securityContext.privileged: not supported",
        ),
        ("", "securityContext: {runAsGroup: 1}", "needs runAsUser"),
        (
            "",
            "securityContext: {runAsUser: -1}",
            "runAsUser: must be a number from 0",
        ),
        (
            "",
            "securityContext: {runAsUser: 0, runAsNonRoot: true}",
            "runAsUser is 0",
        ),
        (
            "",
            "securityContext: {capabilities: {add: [FLY]}}",
            "add[0]: `FLY` is not a capability",
        ),
        (
            "",
            "securityContext: {seccompProfile: {}}",
            "seccompProfile: not supported",
        ),
        (
            "securityContext: {sysctls: []},",
            "",
            "sysctls: not supported",
        ),
        ("", "livenessProbe: {}", "must have one of"),
        (
            "",
            "livenessProbe: {exec: {command: []}}",
            "must begin with a program",
        ),
        (
            "",
            "livenessProbe: {tcpSocket: {port: web}}",
            "`web` is not one of",
        ),
        (
            "",
            "livenessProbe: {tcpSocket: {port: 0}}",
            "from 1 to 65535",
        ),
        (
            "",
            "livenessProbe: {grpc: {port: 1}}",
            "grpc: not supported",
        ),
        (
            "",
            "livenessProbe: {tcpSocket: {port: 1}, successThreshold: 2}",
            "must be 1 here",
        ),
        (
            "",
            "livenessProbe: {httpGet: {port: 1, scheme: HTTPS}}",
            "scheme: not supported",
        ),
        (
            "",
            "livenessProbe: {httpGet: {port: 1, path: \"/ a\"}}",
            "no blanks",
        ),
        (
            "",
            "livenessProbe: {httpGet: {port: 1, host: name}}",
            "must be an address",
        ),
        (
            "",
            "ports: [{containerPort: 1, hostPort: 1}]",
            "hostPort: not supported",
        ),
        (
            "",
            "lifecycle: {postStart: {exec: {command: [a]}}}",
            "postStart: not supported",
        ),
        (
            "",
            "lifecycle: {preStop: {httpGet: {port: 1}}}",
            "exec: required",
        ),
        ("hostname: A,", "", "spec.hostname: `A` is not a name"),
        (
            "hostAliases: [{ip: x, hostnames: [a]}],",
            "",
            "ip: is not an IPv4",
        ),
        (
            "hostAliases: [{ip: 10.0.0.1, hostnames: [\"a b\"]}],",
            "",
            "must be one word",
        ),
        ("dnsPolicy: ClusterFirst,", "", "no DNS of a cluster"),
        (
            "dnsConfig: {nameservers: [1.1.1.1, 1.1.1.2, 1.1.1.3, 1.1.1.4]},",
            "",
            "three at the most",
        ),
        ("terminationGracePeriodSeconds: 4000,", "", "from 0 to 3600"),
        (
            "volumes: [{name: m, emptyDir: {medium: HugePages}}],",
            "",
            "neither `Memory`",
        ),
        (
            "volumes: [{name: m, emptyDir: {medium: Memory, sizeLimit: 1Ti}}],",
            "",
            "more than the guest's memory",
        ),
        (
            "volumes: [{name: m, emptyDir: {medium: Memory}}, {name: m, emptyDir: {medium: Memory}}],",
            "",
            "another volume",
        ),
        ("initContainers: [],", "", "initContainers: not supported"),
    ] {
        let found = read(spec, fields).unwrap_err().to_string();
        assert!(found.contains(wanted), "{wanted}: {found}");
    }
}
