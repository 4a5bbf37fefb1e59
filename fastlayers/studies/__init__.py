"""The experiments of five published reports: each table and plot a study that one command runs again.

`reports/*.toml` says what each run is and what was published of it; `config` reads them. `classifier`, `schedules`,
`losses` and `landscape` are the training; `runner` does one run, `sweep` many; `results` keeps what came out; `report`
shows it beside what was published; `command` is `fastlayers study`.
"""
