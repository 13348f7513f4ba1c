//! The capture's hooks, tried from pods: each row of the classifier, each way of connecting, and what stays untouched.

mod inbound;
mod outbound;
mod sight;
mod unreachable;

use std::net::SocketAddr;

use anyhow::Result;
use sealane::kernel::{layout_dir, links};
use sealane_common::names::programs;
use sealane_tests::lab::Lab;
use sealane_tests::report::{Event, Outcome};

/// Sends some text and reads the answer to its end.
const TEXT: [&str; 3] = ["--text", "in plain words", "--half-close"];

/// The kernel answered the SYN with a reset.
fn refused_at_once(outcome: &Outcome) -> bool {
    !outcome.connected && outcome.error.as_deref() == Some("ECONNREFUSED")
}

/// The client that accept(2) reported.
fn accepted_from(event: &Event) -> Option<SocketAddr> {
    match event {
        Event::Accepted { peer, .. } => Some(*peer),
        Event::Listening { .. } | Event::Closed { .. } => None,
    }
}

/// What the verifier walks is what a program may cost at worst, and what decides whether older kernels load it at all.
#[test]
fn every_program_keeps_within_its_budget() -> Result<()> {
    let budgets = [
        (programs::SK_LOOKUP, 1_320),
        (programs::SOCK_OPS, 830),
        (programs::CONNECT6, 560),
        (programs::CONNECT4, 520),
        (programs::SETSOCKOPT, 275),
        (programs::GETPEERNAME4, 75),
        (programs::GETPEERNAME6, 75),
    ];
    let lab = Lab::new("budget")?;
    let dir = layout_dir(&lab.a.bpffs);
    std::fs::create_dir_all(&dir)?;
    let counts = links::instruction_counts(&dir)?;
    println!("{counts:?}");
    assert_eq!(counts.len(), budgets.len(), "{counts:?}");
    for (name, count) in counts {
        let budget = budgets.iter().find(|(program, _)| *program == name).map(|(_, budget)| *budget);
        assert!(count > 0 && Some(count) <= budget, "{name}: {count} instructions, {budget:?} allowed");
    }
    Ok(())
}
