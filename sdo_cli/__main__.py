from sdo_cli.cli.app import main

main()
