//! Programs as people run them, in an image that other tools made. `cargo xtask test apps` does the same for longer, and for each by itself.
#![allow(missing_docs, unreachable_pub)]

use anyhow::Result;
use migrator_tests::lab::TestLab;
use xtask::apps::{self, App, image};
use xtask::lab::Node;

#[test]
fn servers_keep_their_clients_connections_and_all_that_they_said_to_have() -> Result<()> {
    let test = TestLab::up()?;
    let made = image::ensure(test.project())?;
    test.import(Node::A, &made, &["--name", image::REFERENCE])?;
    let say = &mut |line: &str| println!("{line}");
    apps::run(test.project(), test.lab(), &App::ALL, 3, &[], say)?;
    test.end()
}
