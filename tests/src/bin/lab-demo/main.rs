//! The demo: two nodes, an agent on each, nginx in one pod and curl in another; then what the wire, the logs and the metrics
//! show of it. Every claim that it prints is checked first. `cargo xtask demo` builds and runs it.

#![forbid(unsafe_code)]

mod scene;
mod show;
mod signals;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use sealane_tests::lab;

use crate::scene::Scene;

/// The lab's name; without an owner, so that no test run sweeps it.
const LAB: &str = "sl-demo";

#[derive(Parser)]
struct Args {
    /// Leave everything up
    #[arg(long)]
    keep: bool,
    /// Take down what --keep has left
    #[arg(long)]
    down: bool,
    /// With --down: end with this code
    #[arg(long, hide = true, default_value_t = 0)]
    code: u8,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    if args.down {
        lab::remove(LAB)?;
        println!("The demo's nodes are gone.");
        return Ok(args.code.into());
    }
    signals::take_down_on_interrupt()?;
    let scene = Scene::set(LAB)?;
    let played = show::all(&scene);
    if args.keep {
        show::how_to_look_around(&scene)?;
        std::mem::forget(scene);
        return played.map(|()| ExitCode::SUCCESS);
    }
    drop(scene);
    println!("\nEverything is taken down again. `cargo xtask demo --keep` leaves it up to look around.");
    played.map(|()| ExitCode::SUCCESS)
}
