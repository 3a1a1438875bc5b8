//! Links the interpreter into the target `settings`: the bindings are built as an extension module, which
//! brings none along.

use std::process::Command;

const ASK: &str = "import sysconfig as s; v = s.get_config_var; \
    print(v('LIBDIR'), v('LDVERSION'), v('Py_ENABLE_SHARED'))";

fn main() {
    println!("cargo::rerun-if-env-changed=PYO3_PYTHON");
    if std::env::var_os("CARGO_FEATURE_PYTHON").is_none() {
        return;
    }
    let python = std::env::var("PYO3_PYTHON").unwrap_or_else(|_| "python3".into());
    let answer = Command::new(&python).args(["-c", ASK]).output();
    let answer =
        answer.unwrap_or_else(|error| panic!("cannot run {python}: {error}; set PYO3_PYTHON"));
    let answer = String::from_utf8(answer.stdout).expect("paths of ours are UTF-8");
    let [directory, version, shared] = answer.split_whitespace().collect::<Vec<_>>()[..] else {
        panic!("{python} does not say where its library is: {answer:?}");
    };
    assert_eq!(
        shared, "1",
        "{python} was built without a shared library, so nothing can have it inside: \
         set PYO3_PYTHON to one that was (configure --enable-shared)"
    );
    println!("cargo::rustc-link-search=native={directory}");
    println!("cargo::rustc-link-lib=python{version}");
    println!("cargo::rustc-link-arg-bin=settings=-Wl,-rpath,{directory}");
}
