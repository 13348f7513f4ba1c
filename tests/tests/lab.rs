//! The lab itself, without agents: pods reach each other, captures see it, and nothing is left behind.

use anyhow::Result;
use sealane_tests::lab::Lab;

#[test]
fn pods_reach_each_other_across_the_wire() -> Result<()> {
    let lab = Lab::new("reach")?;
    let web = lab.a.pod("web", 10)?;
    let api = lab.b.pod("api", 11)?;
    let server = api.serve(8080, &["--mode", "echo"])?;
    for to in [api.at(8080), api.at6(8080)] {
        let outcome = web.connect(to, &["--bytes", "300000", "--half-close"])?;
        assert!(outcome.echoed(), "{to}: {outcome:?}");
    }
    println!("{:?}", server.events());
    Ok(())
}
