//! A policy that changes while connections are open.

use std::time::Instant;

use anyhow::Result;
use sealane_tests::config::{Config, spiffe_id};
use sealane_tests::files::Files;
use sealane_tests::trio::Trio;
use serde_json::json;

use crate::{SEND, edit, ping, reset, reset_in_the_end, wait_echoes, wait_open};

#[test]
fn a_caller_that_allow_no_longer_names_loses_its_connections_and_nobody_else_does() -> Result<()> {
    let allow = |ids: &[&str]| json!([{ "from": ids.iter().map(|id| spiffe_id(id)).collect::<Vec<_>>() }]);
    let mut trio = Trio::new("allow", json!({ "mode": "STRICT", "allow": allow(&["web", "cli"]) }))?;
    let cli = trio.lab.a.pod("cli", 13)?;
    trio.mesh.enrol(&cli);
    let files = Files::new(&trio.lab)?;
    files.give_sound(&["web", "api", "cli"])?;
    let _server = trio.api.serve(8080, &[])?;
    let (a, b) = trio.mesh.start_with(|config| edit(&files, config))?;
    let leaving = [ping(&trio.web, &trio.api)?, ping(&trio.web, &trio.api)?];
    let _staying = ping(&cli, &trio.api)?;
    wait_open(&b, "api", 3.0)?;

    let mut config: Config = trio.mesh.config(&trio.lab.b);
    edit(&files, &mut config);
    config.policies[0]["listener"]["allow"] = allow(&["cli"]);
    let begun = Instant::now();
    b.reload(&config)?;
    for ping in leaving {
        reset_in_the_end(ping)?;
    }
    println!("reset {:?} after SIGHUP", begun.elapsed());
    wait_open(&b, "api", 1.0)?;
    wait_echoes(&a, "cli")?;
    let ended = b.access();
    assert_eq!(ended.len(), 2, "{ended:?}");
    for entry in ended {
        let (outcome, peer) = (&entry["outcome"], &entry["peer_id"]);
        assert!(*outcome == "policy_changed" && *peer == spiffe_id("web"), "{entry}");
    }
    b.refuses("inbound", "not_allowed", || reset(&trio.web.connect(trio.api.at(8080), &SEND)?))?;
    assert!(cli.connect(trio.api.at(8080), &SEND)?.echoed());
    Ok(())
}
