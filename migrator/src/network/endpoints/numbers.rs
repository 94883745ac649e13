//! The numbers that this node has for the nodes: they are in pinned maps, so they outlive the service and a change of its configuration. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

/// Numbers nodes by their addresses: one that has a number keeps it, others get one that nobody has. `known`: the addresses by number, of which 0 is this
/// node's own. A peer for which there is no number is left out.
pub(crate) fn number<'a>(
    known: &[Option<IpAddr>],
    peers: impl IntoIterator<Item = (&'a str, IpAddr)>,
) -> BTreeMap<String, u16> {
    let mut taken: Vec<Option<IpAddr>> = known.to_vec();
    let mut numbers = BTreeMap::new();
    let mut new = Vec::new();
    for (name, address) in peers {
        let at = taken
            .iter()
            .skip(1)
            .position(|known| *known == Some(address));
        match at.and_then(|at| u16::try_from(at + 1).ok()) {
            Some(number) => drop(numbers.insert(name.to_owned(), number)),
            None => new.push((name, address)),
        }
    }
    for (name, address) in new {
        let free = taken.iter().skip(1).position(Option::is_none);
        if let Some(at) = free.map(|at| at + 1)
            && let Ok(number) = u16::try_from(at)
        {
            taken[at] = Some(address);
            numbers.insert(name.to_owned(), number);
        }
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        [10, 78, 0, last].into()
    }

    #[test]
    fn a_node_keeps_its_number_whatever_comes_and_goes() {
        let first = number(&[None; 5], [("b", ip(2)), ("c", ip(3))]);
        assert_eq!(first, BTreeMap::from([("b".into(), 1), ("c".into(), 2)]));
        let known = [None, Some(ip(2)), Some(ip(3)), None, None];
        let next = number(&known, [("a", ip(1)), ("c", ip(3)), ("d", ip(4))]);
        let expected = [("a".into(), 3), ("c".into(), 2), ("d".into(), 4)];
        assert_eq!(next, BTreeMap::from(expected));
    }

    #[test]
    fn a_node_for_which_there_is_no_number_is_left_out() {
        let numbers = number(&[None, Some(ip(9)), None], [("b", ip(2)), ("c", ip(3))]);
        assert_eq!(numbers, BTreeMap::from([("b".into(), 2)]));
    }
}
