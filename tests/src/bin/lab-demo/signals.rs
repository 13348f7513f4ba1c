//! Ctrl-C takes the lab down.

use std::env::current_exe;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::Result;
use nix::sys::signal::{SigSet, Signal};

/// From now on SIGINT and SIGTERM turn the process into `lab-demo --down`: that ends every other thread at once, so nothing is
/// made any more while everything is removed. Must be called before there are other threads; programs that we start do not
/// inherit the block, since std's Command clears it.
pub fn take_down_on_interrupt() -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block()?;
    let own = current_exe()?;
    std::thread::spawn(move || {
        let Ok(signal) = signals.wait() else { return };
        let code = 128 + signal as i32;
        eprintln!("\n{signal}: taking everything down");
        let error = Command::new(own).args(["--down", "--code", &code.to_string()]).exec();
        eprintln!("cannot take it down: {error}; run: cargo xtask demo --down");
        std::process::exit(code);
    });
    Ok(())
}
