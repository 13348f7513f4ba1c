//! Ctrl-C takes the lab down.

use std::process::exit;

use anyhow::Result;
use nix::sys::signal::{SigSet, Signal};

/// From now on SIGINT and SIGTERM run `clean_up` and end the process. Must be called before there are other threads; programs
/// that we start do not inherit the block, since std's Command clears it.
pub fn clean_up_on_interrupt(clean_up: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block()?;
    std::thread::spawn(move || {
        let Ok(signal) = signals.wait() else { return };
        eprintln!("\n{signal}: taking everything down");
        if let Err(error) = clean_up() {
            eprintln!("{error:#}");
        }
        exit(128 + signal as i32);
    });
    Ok(())
}
