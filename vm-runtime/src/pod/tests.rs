use proptest::prelude::*;

use super::*;

const FULL: &str = r#"
apiVersion: v1
kind: Pod
metadata:
  name: web
  labels: {app: web}
  annotations:
    other.example/x: "1"
    migrator/ipv4: 10.77.0.10/24
    migrator/ipv6: fd77::10/64
    migrator/gateway4: 10.77.0.1
    migrator/gateway6: fe80::1
spec:
  restartPolicy: Never
  containers:
  - name: web
    image: web:1
    command: [/bin/server]
    args: [--port, "80"]
    workingDir: /srv
    env:
    - {name: MODE, value: fast}
    - name: EMPTY
    resources: {limits: {memory: 64Mi, cpu: 1500m}}
  - name: side
    image: side
"#;

/// The smallest pod, with lines added below `metadata`, in the annotations, and in the container.
fn pod(metadata: &str, annotation: &str, container: &str) -> String {
    format!(
        "metadata:\n  name: a\n{metadata}  annotations:\n    migrator/ipv4: 10.0.0.2/24\n{annotation}\
         spec:\n  containers:\n  - name: c\n    image: i\n{container}"
    )
}

fn message(text: &str) -> String {
    PodSpec::from_yaml(text).expect_err(text).to_string()
}

#[test]
fn a_full_pod_is_read() {
    let pod = PodSpec::from_yaml(FULL).unwrap();
    assert_eq!(pod.name, "web");
    assert_eq!(pod.labels["app"], "web");
    assert_eq!(pod.net.ipv4, Some(("10.77.0.10".parse().unwrap(), 24)));
    assert_eq!(pod.net.ipv6, Some(("fd77::10".parse().unwrap(), 64)));
    assert_eq!(pod.net.gateway6, Some("fe80::1".parse().unwrap()));
    assert_eq!(pod.memory, Bytes::mib(64 + 128 + 128));
    assert_eq!(pod.vcpus, 2);
    let [web, side] = &pod.containers[..] else {
        panic!("two containers")
    };
    assert_eq!(
        web.command.as_deref(),
        Some(&["/bin/server".to_owned()][..])
    );
    assert_eq!(web.args.as_deref().unwrap(), ["--port", "80"]);
    assert_eq!(web.env[0], ("MODE".to_owned(), "fast".to_owned()));
    assert_eq!(web.env[1], ("EMPTY".to_owned(), String::new()));
    assert_eq!(web.memory_limit, Some(Bytes::mib(64)));
    assert_eq!(web.cpu_limit_milli, Some(1500));
    assert_eq!((side.command.as_ref(), side.memory_limit), (None, None));
    pod.validate().unwrap();
}

#[test]
fn the_mac_is_the_same_on_every_node() {
    let mac = |text: &str| PodSpec::from_yaml(text).unwrap().net.mac.to_string();
    let derived = mac(&pod("", "", ""));
    assert!(derived.starts_with("52:54:00:"), "{derived}");
    assert_eq!(derived, mac(&pod("", "", "")));
    assert_ne!(derived, mac(FULL));
    let own = pod("", "    migrator/mac: 02:00:00:00:00:07\n", "");
    assert_eq!(mac(&own), "02:00:00:00:00:07");
}

#[test]
fn the_annotation_decides_the_memory() {
    let text = pod("", "    migrator/vm-memory: 0.5Gi\n", "");
    assert_eq!(PodSpec::from_yaml(&text).unwrap().memory, Bytes::mib(512));
}

#[test]
fn the_annotation_makes_the_memory_of_huge_pages() {
    let huge = |annotation| {
        PodSpec::from_yaml(&pod("", annotation, ""))
            .unwrap()
            .hugepages
    };
    assert!(!huge(""));
    assert!(!huge("    migrator/hugepages: \"false\"\n"));
    assert!(huge("    migrator/hugepages: \"true\"\n"));
}

#[test]
fn the_annotation_keeps_a_pod_from_templates() {
    let cold = |annotation| {
        PodSpec::from_yaml(&pod("", annotation, ""))
            .unwrap()
            .cold_start
    };
    assert!(!cold("") && !cold("    migrator/template: \"true\"\n"));
    assert!(cold("    migrator/template: \"false\"\n"));
}

#[test]
fn fields_that_would_be_ignored_are_refused_by_path() {
    for (text, expected) in [
        (
            pod("", "", "    stdinOnce: true\n"),
            "spec.containers[0].stdinOnce: not supported; remove it",
        ),
        (
            pod("", "", "    comand: [x]\n"),
            "spec.containers[0].comand: not supported; did you mean `command`?",
        ),
        (
            pod("", "", "    env: [{name: A, valueFrom: {}}]\n"),
            "spec.containers[0].env[0].valueFrom: not supported; there are no config maps and secrets to take it from: write its `value`",
        ),
        (
            pod("", "", "    resources: {requests: {cpu: 1}}\n"),
            "spec.containers[0].resources.requests: not supported; remove it",
        ),
        (
            pod("  namespace: x\n", "", ""),
            "metadata.namespace: not supported; remove it",
        ),
        (
            pod("", "", "  hostNetwork: true\n"),
            "spec.hostNetwork: not supported; remove it",
        ),
        (
            pod("", "", "  restartPolicy: Sometimes\n"),
            "spec.restartPolicy: `Sometimes` is none of Always, OnFailure and Never",
        ),
        (
            pod("", "", "status: {}\n"),
            "status: not supported; remove it",
        ),
    ] {
        assert_eq!(message(&text), expected);
    }
    let text = pod("", "    migrator/ipv5: x\n", "");
    assert!(message(&text).starts_with("metadata.annotations[\"migrator/ipv5\"]: not supported"));
}

#[test]
fn wrong_values_are_refused_with_a_hint() {
    let annotation = |line: &str| pod("", &format!("    migrator/{line}\n"), "");
    let container = |line: &str| pod("", "", &format!("    {line}\n"));
    for (text, part) in [
        (
            container("args: [80]"),
            "spec.containers[0].args[0]: a number where text belongs; put it in quotes",
        ),
        (
            container("env: [{name: A, value: yes}, {name: A}]"),
            "env[1].name: `A` is set twice",
        ),
        (
            container("env: [{name: A=, value: x}]"),
            "env[0].name: must be",
        ),
        (container("workingDir: srv"), "workingDir: must be absolute"),
        (
            container("resources: {limits: {memory: 128m}}"),
            "did you mean `128Mi`?",
        ),
        (
            container("resources: {limits: {memory: 12}}"),
            "less than 4Mi",
        ),
        (
            container("resources: {limits: {cpu: 0}}"),
            "limits.cpu: must be more than 0",
        ),
        (
            container("resources: {limits: {cpu: 900}}"),
            "add up to 900 CPUs",
        ),
        (
            container("resources: {limits: {memory: lots}}"),
            "is not a quantity, such as 512Mi",
        ),
        (annotation("ipv6: fd77::10"), "such as fd77::10/64"),
        (annotation("ipv6: fd77::10/129"), "prefix /129"),
        (annotation("ipv6: ff02::1/64"), "is not a host's"),
        (
            annotation("gateway4: 10.0.1.1"),
            "gateway4\"]: 10.0.1.1 is not another address",
        ),
        (
            annotation("gateway6: fd77::1"),
            "gateway6\"]: fd77::1 is not another address",
        ),
        (annotation("mac: 01:00:5e:00:00:01"), "unicast MAC"),
        (annotation("vm-memory: 1Mi"), "not between"),
        (annotation("vm-memory: 99999Ti"), "not between"),
        (annotation("hugepages: 2Mi"), "true or false"),
        (
            "metadata: {name: a}\nspec: {containers: []}".to_owned(),
            "a pod needs an address",
        ),
        ("metadata: {}".to_owned(), "spec: required"),
        ("kind: Deployment".to_owned(), "kind: must be `Pod`"),
        ("- a".to_owned(), "the file: a list where a mapping belongs"),
        (String::new(), "the file: nothing where a mapping belongs"),
    ] {
        let message = message(&text);
        assert!(message.contains(part), "{message}\n{text}");
    }
    for address in [
        "10.0.0.0/24",
        "10.0.0.255/24",
        "127.0.0.1/8",
        "224.0.0.1/24",
        "10.0.0.1/33",
        "10.0.0.1/0",
    ] {
        let text = pod("", "", "").replace("10.0.0.2/24", address);
        assert!(message(&text).contains("migrator/ipv4"), "{address}");
    }
    for name in ["A", "-a", "a-", "a.b", "a_b"] {
        let text = pod("", "", "").replace("name: a\n", &format!("name: {name}\n"));
        assert!(message(&text).starts_with("metadata.name: "), "{name}");
    }
    let twice = pod("", "", "  - name: c\n    image: j\n");
    assert!(message(&twice).contains("spec.containers[1].name: `c` is the name of another"));
}

#[test]
fn a_spec_from_a_peer_is_checked_by_the_same_rules() {
    let mut pod = PodSpec::from_yaml(FULL).unwrap();
    pod.containers[0].name = "../../etc".to_owned();
    assert!(pod.validate().is_err());
    let mut pod = PodSpec::from_yaml(FULL).unwrap();
    pod.memory = Bytes(u64::MAX);
    assert!(pod.validate().is_err());
    let mut pod = PodSpec::from_yaml(FULL).unwrap();
    pod.net.ipv4 = Some(("10.0.0.1".parse().unwrap(), 255));
    pod.net.ipv6 = None;
    assert!(pod.validate().is_err());
}

#[test]
fn yaml_tricks_are_refused() {
    assert!(message("a: 1\na: 2").contains("YAML"));
    assert!(message("---\na: 1\n---\nb: 2").contains("YAML"));
    assert!(matches!(
        PodSpec::from_yaml(&" ".repeat(2 << 20)),
        Err(PodError::TooLong)
    ));
    assert!(PodSpec::from_yaml(&"[".repeat(10_000)).is_err());
    // Each line ten times the one before.
    let mut bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
    for i in 1..12 {
        let before = format!("*a{},", i - 1).repeat(10);
        bomb.push_str(&format!("a{i}: &a{i} [{before}]\n"));
    }
    assert!(PodSpec::from_yaml(&bomb).is_err());
    assert!(message(&FULL.replace("name: web\n", "name: !x web\n")).contains("tagged"));
}

proptest! {
    #[test]
    fn the_parser_never_panics_on_text(text in "\\PC*") {
        let _ = PodSpec::from_yaml(&text);
    }

    #[test]
    fn the_parser_never_panics_on_a_changed_pod(
        cuts in prop::collection::vec((0..FULL.len(), 0..20_usize, "[ -~\n\\p{Greek}]{0,12}"), 0..6),
    ) {
        let mut text: Vec<char> = FULL.chars().collect();
        for (at, length, new) in cuts {
            let at = at.min(text.len());
            let end = (at + length).min(text.len());
            text.splice(at..end, new.chars());
        }
        let text: String = text.into_iter().collect();
        if let Ok(pod) = PodSpec::from_yaml(&text) {
            prop_assert!(pod.validate().is_ok());
        }
    }

    #[test]
    fn quantities_never_panic(text in "[0-9.]{0,30}[a-zA-Z]{0,3}") {
        let _ = PodSpec::from_yaml(&pod("", &format!("    migrator/vm-memory: \"{text}\"\n"), ""));
    }

    #[test]
    fn every_prefix_is_handled(address in any::<u32>(), prefix in any::<u8>(), other in any::<u128>()) {
        let mut pod = PodSpec::from_yaml(FULL).unwrap();
        pod.net.ipv4 = Some((address.into(), prefix));
        pod.net.ipv6 = Some((other.into(), prefix));
        let _ = pod.validate();
    }
}
