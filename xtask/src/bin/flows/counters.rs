//! What this network stack dropped by itself: a loss that is none of the migration's.

use std::fs::read_to_string;

/// Fields of /proc/net/snmp.
const SNMP: [(&str, &str); 8] = [
    ("Ip", "InDiscards"),
    ("Ip", "OutDiscards"),
    ("Ip", "ReasmTimeout"),
    ("Ip", "ReasmFails"),
    ("Icmp", "InErrors"),
    ("Udp", "InErrors"),
    ("Udp", "RcvbufErrors"),
    ("Tcp", "RetransSegs"),
];
/// Fields of /proc/net/snmp6.
const SNMP6: [&str; 6] = [
    "Ip6InDiscards",
    "Ip6OutDiscards",
    "Ip6ReasmTimeout",
    "Ip6ReasmFails",
    "Udp6InErrors",
    "Udp6RcvbufErrors",
];

/// All of them, as a JSON object.
pub(crate) fn json() -> String {
    let snmp = read_to_string("/proc/net/snmp").unwrap_or_default();
    let snmp6 = read_to_string("/proc/net/snmp6").unwrap_or_default();
    let v4 = SNMP
        .iter()
        .map(|(group, field)| (format!("{group}{field}"), pair(&snmp, group, field)));
    let v6 = SNMP6
        .iter()
        .map(|field| ((*field).to_owned(), single(&snmp6, field)));
    let raw = ["/proc/net/raw", "/proc/net/raw6"]
        .iter()
        .map(|path| drops(&read_to_string(path).unwrap_or_default()))
        .sum();
    let list: Vec<String> = v4
        .chain(v6)
        .chain([("RawDrops".to_owned(), raw)])
        .map(|(name, value)| format!(r#""{name}":{value}"#))
        .collect();
    format!("{{{}}}", list.join(","))
}

/// Two lines of the same group: names, then values.
fn pair(text: &str, group: &str, field: &str) -> u64 {
    let mut lines = text
        .lines()
        .filter_map(|line| line.strip_prefix(group)?.strip_prefix(": "));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else {
        return 0;
    };
    let column = names.split_whitespace().position(|name| name == field);
    column
        .and_then(|column| values.split_whitespace().nth(column)?.parse().ok())
        .unwrap_or(0)
}

fn single(text: &str, field: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(field)?.trim().parse().ok())
        .unwrap_or(0)
}

/// The last column of each socket's line.
fn drops(text: &str) -> u64 {
    text.lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok())
        .sum()
}
